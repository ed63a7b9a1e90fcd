"""`ttt-megatron train`: train a model, or go on where a run stopped."""

import argparse
import gc
import os
import sys
from pathlib import Path

from ttt_megatron.config import RunConfig, load_recipe
from ttt_megatron.parallel.launcher import WorkerError, launch, naming_rank, under_torchrun
from ttt_megatron.tracking.run_tags import RECIPE_VARIABLE
from ttt_megatron.training.result import TrainingResult

NAME = "train"
HELP = "Train a model, or go on where a run stopped."
EPILOG = """examples:
  ttt-megatron train recipes/quickstart.yaml
  ttt-megatron train recipes/quickstart.yaml training.steps=200 training.output=runs/short
  ttt-megatron train recipes/quickstart.yaml parallel.data=2     two processes on this machine
  ttt-megatron train recipes/quickstart.yaml parallel.tensor=2   two that share every matrix
  ttt-megatron train recipes/quickstart.yaml parallel.context=2  two that share every sequence
  torchrun --nproc-per-node 2 -m ttt_megatron.cli.main train recipes/quickstart.yaml parallel.data=2

The same command again goes on from the newest checkpoint in training.output. SIGTERM or Ctrl-C
ends a run after its current step, with a checkpoint; the exit status is then 128 + the signal."""

EXIT_WORKER_FAILED = 1
EXIT_SIGNAL_BASE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over; a run already in training.output is moved to previous-N inside it",
    )


def run(args: argparse.Namespace) -> int:
    """Trains; raises UserError for whatever the user can fix."""
    with naming_rank():
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    config = load_recipe(args.recipe, args.overrides)
    os.environ[RECIPE_VARIABLE] = str(Path(args.recipe).resolve())
    # torch takes seconds to import: not before the recipe is known to be good.
    from ttt_megatron.training.preflight import check_start, resolve_run

    config = resolve_run(config)
    if not under_torchrun():
        check_start(config, fresh=args.fresh)
    try:
        result = launch(_work, (config, args.fresh), config.parallel.world_size)
    except WorkerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return EXIT_WORKER_FAILED
    if os.environ.get("RANK", "0") != "0":
        return 0
    if result.stop_signal is not None:
        return EXIT_SIGNAL_BASE + result.stop_signal
    print(f"trained {result.step} of {result.steps} steps, last loss {result.last_loss:.4f}")
    print(f"checkpoint  {result.checkpoint}")
    if result.tracking_run is not None:
        print(f"MLflow      {result.tracking_store}  (run {result.tracking_run})")
        if not str(result.tracking_store).startswith("http"):
            print(f"            mlflow ui --backend-store-uri {result.tracking_store}")
    print(f"next        ttt-megatron evaluate {config.training.output}")
    return 0


def _work(config: RunConfig, fresh: bool) -> TrainingResult:
    """One rank. Only here is megatron-core imported: the parent has no need of it."""
    # Looking through what imports make for garbage takes a fifth of their time, and finds none.
    gc.disable()
    from ttt_megatron.training.run import train_worker

    gc.freeze()
    gc.enable()
    return train_worker(config, fresh)
