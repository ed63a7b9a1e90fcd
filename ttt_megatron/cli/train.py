"""`ttt-megatron train`: train a model, or go on where a run stopped."""

import argparse
import gc
import os
import sys
import time
from pathlib import Path

from ttt_megatron.config import RunConfig, load_recipe
from ttt_megatron.config.elastic import fit_to_world
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.launcher import WorkerError, launch, naming_rank, under_torchrun
from ttt_megatron.resilience.events import (
    ATTEMPT,
    Event,
    read_events,
    record_event,
    refuse_hopeless,
)
from ttt_megatron.resilience.supervisor import RestartPolicy, Supervisor, end_with_supervisor
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, newest_step
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
  torchrun --nnodes 2:4 --nproc-per-node 8 -m ttt_megatron.cli.main train RECIPE \
    parallel.elastic=true                                        on the nodes that there are
  torchrun --nproc-per-node 2 -m ttt_megatron.cli.main train recipes/quickstart.yaml parallel.data=2

The same command again goes on from the newest checkpoint in training.output. SIGTERM or Ctrl-C
ends a run after its current step, with a checkpoint; the exit status is then 128 + the signal. It
is 2 after an error that you can fix, and that trying again does not, and 1 after any other. What
befell a run is in events.jsonl of training.output.

--simulate-world N lays the recipe out on N GPUs as its own parallel section says, or layouts.yaml
beside it, or `ttt-megatron plan`, and tells in seconds what would fail there."""

EXIT_WORKER_FAILED = 1
EXIT_USER_ERROR = 2
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
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often to start a run that was cut off again without a newer checkpoint; under "
        "torchrun its own --max-restarts counts (default: %(default)s)",
    )
    parser.add_argument(
        "--restart-wait",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="before the first restart; doubles from one to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--simulate-world",
        type=int,
        metavar="N",
        help="train nothing; say what a run on N GPUs would build, hold and send, or why it fails",
    )
    parser.add_argument(
        "--gpu", default="h100", help="kind of GPU of a simulated run (default: h100)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains; raises UserError for whatever the user can fix."""
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts} must not be negative")
    if args.simulate_world is not None:
        return _simulate(args)
    with naming_rank():
        config = load_recipe(args.recipe, args.overrides)
        if args.max_restarts and not under_torchrun():
            return _supervise(args, Path(config.training.output))
        return _train(args, config)


def _supervise(args: argparse.Namespace, output: Path) -> int:
    """The same training in a process of its own, started again when it is cut off."""
    began = time.time()
    command = [sys.executable, "-m", "ttt_megatron.cli.main", "train", args.recipe]

    def attempt(restarts: int) -> list[str]:
        events = read_events(output)
        begun = any(event.kind == "started" and event.time >= began for event in events)
        return [*command, *args.overrides, *(["--fresh"] if args.fresh and not begun else [])]

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)
        record_event(output, Event(kind="restarting", message=sentence))

    return Supervisor(
        command=attempt,
        policy=RestartPolicy(max_restarts=args.max_restarts, first_wait=args.restart_wait),
        progress=lambda: newest_step(output / CHECKPOINTS),
        final=frozenset({0, EXIT_USER_ERROR}),
        tell=tell,
        attempt=ATTEMPT,
    ).run()


def _train(args: argparse.Namespace, config: RunConfig) -> int:
    end_with_supervisor()
    refuse_hopeless(Path(config.training.output))
    if under_torchrun() and config.parallel.elastic:
        config = fit_to_world(config, int(os.environ["WORLD_SIZE"]))
def _simulate(args: argparse.Namespace) -> int:
    from ttt_megatron.planning.hardware import find_hardware

    hardware = find_hardware(args.gpu)
    load_recipe(args.recipe, args.overrides)  # before torch is imported, as below
    from ttt_megatron.simulation.report import report
    from ttt_megatron.simulation.simulate import simulate_run

    print(report(simulate_run(args.recipe, args.overrides, args.simulate_world, hardware)))
    return 0


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
    if os.environ.get("RANK", "0") != "0":
        return 0
    if result.stop_signal is not None:
        return EXIT_SIGNAL_BASE + result.stop_signal
    print(f"trained {result.step} of {result.steps} steps, last loss {result.last_loss:.4f}")
    print(f"checkpoint  {result.checkpoint}")
    if result.tracking_store is not None:
        print(f"MLflow      {result.tracking_store}  (run {result.tracking_run})")
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
