"""`ttt-megatron train --max-restarts`: the same training in a process of its own, again and again.

No torch here: this process only waits.
"""

import argparse
import sys
import time
from pathlib import Path

from ttt_megatron.errors import UserError
from ttt_megatron.resilience.events import ATTEMPT, Event, read_events, record_event
from ttt_megatron.resilience.supervisor import RestartPolicy, Supervisor
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, newest_step

# Done, and refused: the same would come of trying again.
_FINAL = frozenset({0, 2})


def add_restart_arguments(parser: argparse.ArgumentParser) -> None:
    """How often a run is started again, and after how long."""
    parser.add_argument(
        "--max-restarts",
        type=_number,
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


def _number(text: str) -> int:
    if not text.isdigit():
        raise UserError(f"--max-restarts {text} must be 0 or a positive number")
    return int(text)


class _Begun:
    """Whether what lies in the folder is this training's, and not of a run that --fresh puts aside.

    Told by an event; a full disk may lose that, and then by the folder of checkpoints being
    another one than at first.
    """

    def __init__(self, output: Path, *, fresh: bool) -> None:
        self._output = output
        self._since = time.time()
        self._before = _identity(output / CHECKPOINTS)
        self._begun = not fresh

    def __call__(self) -> bool:
        if not self._begun:
            now = _identity(self._output / CHECKPOINTS)
            self._begun = now not in (None, self._before) or any(
                event.kind == "started" and event.time >= self._since
                for event in read_events(self._output)
            )
        return self._begun


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def supervise(args: argparse.Namespace, output: Path) -> int:
    """Trains by `args` but for the restarts; the last attempt's exit status."""
    begun = _Begun(output, fresh=args.fresh)
    command = [sys.executable, "-m", "ttt_megatron.cli.main", "train", args.recipe]

    def attempt(restarts: int) -> list[str]:
        # What has been put aside for a fresh start is not to be put aside again.
        return [*command, *args.overrides, *([] if begun() else ["--fresh"])]

    def tell(sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)
        record_event(output, Event(kind="restarting", message=sentence))

    return Supervisor(
        command=attempt,
        policy=RestartPolicy(max_restarts=args.max_restarts, first_wait=args.restart_wait),
        progress=lambda: newest_step(output / CHECKPOINTS) if begun() else -1,
        final=_FINAL,
        tell=tell,
        attempt=ATTEMPT,
    ).run()
