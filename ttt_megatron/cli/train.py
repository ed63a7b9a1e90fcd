"""`ttt-megatron train`: train a model, or go on where a run stopped."""

import argparse
import atexit
import gc
import os
import signal
import sys
from pathlib import Path

from ttt_megatron.cli.train_supervised import add_restart_arguments, supervise
from ttt_megatron.cluster.outcome import (
    FINISHED,
    REFUSED,
    STOPPED,
    read_outcome,
    telling_outcome,
    write_outcome,
)
from ttt_megatron.config import RunConfig, load_recipe
from ttt_megatron.config.elastic import fit_to_world
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.launcher import WorkerError, launch, naming_rank, under_torchrun
from ttt_megatron.resilience.events import Event, record_event
from ttt_megatron.resilience.supervisor import end_with_supervisor
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
  ttt-megatron train recipes/quickstart.yaml --max-restarts 3    started again if it crashes
  ttt-megatron train recipes/3b/extend-e2e-128k.yaml --simulate-world 128    nothing is trained
  torchrun --nproc-per-node 2 -m ttt_megatron.cli.main train recipes/quickstart.yaml parallel.data=2
  torchrun --nnodes 2:4 --nproc-per-node 8 -m ttt_megatron.cli.main train RECIPE \\
    parallel.elastic=true                                        on the nodes that there are

The same command again goes on from the newest checkpoint in training.output. SIGTERM or Ctrl-C
ends a run after its current step, with a checkpoint; the exit status is then 128 + the signal. It
is 2 after an error that trying again does not cure, 75 after one that may pass (a full disk, a run
that is still ending), and 1 after any other. What befell a run is in events.jsonl of
training.output. On a cluster, `ttt-megatron submit` starts it, and starts it again
(docs/cluster.md).

--simulate-world N lays the recipe out on N GPUs as its own parallel section says, or layouts.yaml
beside it, or `ttt-megatron plan`, and tells in seconds what would fail there."""

EXIT_WORKER_FAILED = 1
EXIT_REFUSED = 2
EXIT_SIGNAL_BASE = 128
_STOPPED = (EXIT_SIGNAL_BASE + signal.SIGTERM, EXIT_SIGNAL_BASE + signal.SIGINT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over; a run already in training.output is moved to previous-N inside it; not "
        "where torchrun may start the ranks again",
    )
    add_restart_arguments(parser)
    parser.add_argument(
        "--simulate-world",
        type=int,
        metavar="N",
        help="train nothing; say what a run on N GPUs would build, hold and send, or why it fails",
    )
    parser.add_argument(
        "--gpu", default="h100", help="kind of GPU of a simulated run (default: h100)"
    )
    parser.add_argument(
        "--outcome",
        type=Path,
        metavar="FILE",
        help="for job scripts: write how the run ended here (finished, stopped or refused)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains; raises UserError for whatever the user can fix."""
    if args.simulate_world is not None:
        return _simulate(args)
    if args.outcome is None:
        with naming_rank():
            return _start(args)
    if (told := read_outcome(args.outcome)) is not None and told.ended == REFUSED:
        # Torchrun starts the ranks again after any error, and this one would come back.
        return EXIT_REFUSED
    with telling_outcome(args.outcome):
        with naming_rank():
            status = _start(args)
        if os.environ.get("RANK", "0") == "0" and status in (0, *_STOPPED):
            write_outcome(args.outcome, FINISHED if status == 0 else STOPPED)
    return status


def _simulate(args: argparse.Namespace) -> int:
    from ttt_megatron.planning.hardware import find_hardware

    hardware = find_hardware(args.gpu)
    load_recipe(args.recipe, args.overrides)  # before torch is imported, as below
    from ttt_megatron.simulation.report import report
    from ttt_megatron.simulation.simulate import simulate_run

    print(report(simulate_run(args.recipe, args.overrides, args.simulate_world, hardware)))
    return 0


def _start(args: argparse.Namespace) -> int:
    config = load_recipe(args.recipe, args.overrides)
    os.environ[RECIPE_VARIABLE] = str(Path(args.recipe).resolve())
    if under_torchrun():
        if args.fresh:
            _refuse_fresh_again(config)
        if config.parallel.elastic:
            config = fit_to_world(config, int(os.environ["WORLD_SIZE"]))
    elif args.max_restarts:
        return supervise(args, Path(config.training.output))
    end_with_supervisor()
    return _train(args, config)


def _refuse_fresh_again(config: RunConfig) -> None:
    """Raises UserError where torchrun may start the same command, --fresh and all, again."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts == 0 and not config.parallel.elastic:
        return
    cause = "parallel.elastic=true" if restarts == 0 else f"its --max-restarts {restarts}"
    raise UserError(
        f"--fresh, and torchrun may start the ranks again ({cause}): every time the run would "
        f"begin anew. Move {config.training.output} away, or choose another training.output, and "
        f"leave --fresh out"
    )


def _train(args: argparse.Namespace, config: RunConfig) -> int:
    # torch takes seconds to import: not before the recipe is known to be good.
    from ttt_megatron.training.preflight import check_start, resolve_run

    config = resolve_run(config)
    if not under_torchrun():
        check_start(config, fresh=args.fresh)
    try:
        result = launch(_work, (config, args.fresh), config.parallel.world_size)
    except WorkerError as failure:
        print(f"error: {failure}", file=sys.stderr)
        record_event(Path(config.training.output), Event(kind="failed", message=str(failure)))
        return EXIT_WORKER_FAILED
    if result.stop_signal is not None:
        # On every rank: the nodes of an elastic launch must not tell success and failure apart.
        return EXIT_SIGNAL_BASE + result.stop_signal
    if os.environ.get("RANK", "0") != "0":
        return 0
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
    # At the end of a rank that torchrun started, nanobind would call all of it leaked.
    atexit.register(gc.unfreeze)
    gc.enable()
    return train_worker(config, fresh)
