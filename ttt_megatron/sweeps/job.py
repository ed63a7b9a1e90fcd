"""A point's processes: one command after the other, their words in one log."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ttt_megatron.config import to_yaml
from ttt_megatron.sweeps.points import Point
from ttt_megatron.sweeps.spec import Sweep
from ttt_megatron.sweeps.state import PointState

PROGRAM = (sys.executable, "-m", "ttt_megatron.cli.main")
RECIPES, LOGS = "recipes", "logs"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LAST_LINES = 5
# Before any fork: a child must not load libraries.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Job:
    """What is still to do for a point, in processes of its own; its log is `log`."""

    def __init__(self, point: Point, commands: Sequence[Sequence[str]], log: Path) -> None:
        self.point = point
        self.log = log
        self._commands = [list(command) for command in commands]
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}

    def start(self, environment: Mapping[str, str]) -> None:
        """Starts the first command, with these variables beside this process's own."""
        self._environment = {**os.environ, **environment}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._next("wb")

    def _next(self, mode: str) -> None:
        with self.log.open(mode) as log:
            self._process = subprocess.Popen(
                self._commands.pop(0),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # Ctrl-C is for this process, which asks its children to stop in good order.
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )

    def poll(self) -> int | None:
        """None while there is something to do, then the last command's exit status."""
        assert self._process is not None
        status = self._process.poll()
        if status == 0 and self._commands:
            self._next("ab")
            return None
        return status

    def stop(self) -> None:
        """Asks for the end after the current step, with a checkpoint."""
        self._commands.clear()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once, and waits for that."""
        self._commands.clear()
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def last_lines(self) -> list[str]:
        """The log's last lines that say something."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]


def _stop_with_parent() -> None:
    """In the child: no run goes on unseen if the sweep is killed; it saves and ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def make_job(point: Point, state: PointState, sweep: Sweep, output: Path) -> Job:
    """What a point lacks: training (or its last evaluation loss), then the evaluation."""
    commands = []
    if not state.trained or sweep.loss in state.missing:
        recipe = output / RECIPES / f"{point.name}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        beside = recipe.with_name(f".{recipe.name}.{os.getpid()}.tmp")
        beside.write_text(to_yaml(point.config), encoding="utf-8")
        beside.replace(recipe)
        commands.append([*PROGRAM, "train", str(recipe)])
    if sweep.evaluate is not None:
        commands.append([*PROGRAM, "evaluate", str(point.folder), *evaluate_words(sweep.evaluate)])
    return Job(point, commands, output / LOGS / f"{point.name}.log")


def evaluate_words(options: Mapping[str, object]) -> list[str]:
    """Options of `ttt-megatron evaluate` as its command line has them."""
    words = []
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return words


def death_in_words(status: int) -> str:
    """An exit status as a user would say it."""
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
