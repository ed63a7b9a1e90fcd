"""A process that waits in vain says where, and ends.

A collective that not all ranks come to, a file system that does not answer, a kernel that never
returns: all look the same from outside. Every rank has a watchdog of its own, so that each writes
down its stack while it still hangs, and whoever started them starts them again.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ttt_megatron.parallel.accounts import WorkerError, leave_account
from ttt_megatron.resilience.events import Event, record_event
from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

STACKS = "stacks"
_EXIT_HUNG = 1
_LOOKS_A_LIMIT = 20
_LONGEST_PAUSE = 5.0
# The ranks neither begin to wait nor look at the same moment: none is to end before the others have
# written, which may be as much later as they pause between looks.
_GRACE_SECONDS = 3.0
# What hangs may be the very file system that is to take the stacks.
_WRITING_SECONDS = 10.0


class HungError(WorkerError):
    """No step, evaluation or checkpoint was finished for longer than faults.hang_minutes."""


class Watchdog(Callback):
    """Ends this process when nothing is finished for `limit` seconds, and writes its stacks.

    They are in `output/stacks`, of all threads, or in stderr where that folder does not take them.
    Starts with the first step: what comes before has time limits of its own. Time during which the
    whole process was suspended, as a batch system may do, does not count.
    """

    def __init__(self, output: Path, limit: float) -> None:
        self._folder = output / STACKS
        self._output = output
        self._limit = limit
        self._pause = min(limit / _LOOKS_A_LIMIT, _LONGEST_PAUSE)
        self._signs = 0
        self._step = 0
        self._world = 1
        self._began = 0.0
        self._rank = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def on_start(self, trainer: Trainer) -> None:
        """Begins to watch."""
        groups = trainer.parts.groups
        self._rank, self._world = groups.rank, groups.world_size
        self._began = time.time()
        self.on_alive(trainer)
        self._thread.start()

    def on_alive(self, trainer: Trainer) -> None:
        """Begins to count anew."""
        self._step = trainer.progress.step
        self._signs += 1

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """A step is a sign of life."""
        self.on_alive(trainer)

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """So is an evaluation."""
        self.on_alive(trainer)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """And a checkpoint."""
        self.on_alive(trainer)

    def close(self, trainer: Trainer) -> None:
        """Watches no longer."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        waited, signs, before = 0.0, self._signs, time.monotonic()
        while not self._stop.wait(self._pause):
            now = time.monotonic()
            waited += min(now - before, 2 * self._pause)
            before = now
            if signs != self._signs:
                waited, signs = 0.0, self._signs
            if waited > self._limit:
                self._end(waited)

    def _end(self, waited: float) -> None:
        """Ends the process whatever the file systems do, unless the run has ended by then."""
        closed = False
        try:
            where = str(self._folder)
            if not _in_time(lambda: self._write_stacks(waited)):
                where = f"rank {self._rank}'s stderr"
                _in_time(lambda: _print(self._stacks(waited)))
            closed = self._stop.wait(self._pause + _GRACE_SECONDS)
            if not closed:
                self._tell(waited, where)
        finally:
            if not closed:
                os._exit(_EXIT_HUNG)

    def _tell(self, waited: float, where: str) -> None:
        lacking = [""]
        _in_time(lambda: lacking.insert(0, self._lacking()))
        message = (
            f"nothing finished for {waited:.0f} s after step {self._step} (faults.hang_minutes); "
            f"where the ranks stood is in {where}{lacking[0]}. The same command goes on from "
            f"the last checkpoint"
        )
        _in_time(lambda: leave_account(HungError(message)))
        event = Event(kind="hung", message=message, step=self._step)
        if not _in_time(lambda: record_event(self._output, event)):
            _in_time(lambda: _print(message))
        _in_time(sys.stderr.flush)

    def _write_stacks(self, waited: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.write_text(self._stacks(waited), encoding="utf-8")

    def _stacks(self, waited: float) -> str:
        return (
            f"process {os.getpid()} on {socket.gethostname()}: nothing finished for "
            f"{waited:.0f} s after step {self._step}\n" + "\n".join(_stack_lines()) + "\n"
        )

    def _lacking(self) -> str:
        silent = [rank for rank in range(self._world) if not self._has_written(rank)]
        if not silent:
            return ""
        return f"; rank {', '.join(map(str, silent))} wrote nothing and may be stopped or gone"

    def _has_written(self, rank: int) -> bool:
        paths = self._folder.glob(f"rank-{rank}-*.txt")
        return any(path.stat().st_mtime >= self._began for path in paths)


def _in_time(work: Callable[[], object]) -> bool:
    """Whether the work was done within its time and without an OSError; what hangs is left."""
    done: list[bool] = []

    def try_it() -> None:
        try:
            work()
        except OSError:
            return
        done.append(True)

    thread = threading.Thread(target=try_it, name="watchdog writes", daemon=True)
    thread.start()
    thread.join(_WRITING_SECONDS)
    return bool(done)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stack_lines() -> Iterator[str]:
    """The stacks of all threads, the newest call first.

    In memory alone: faulthandler keeps the interpreter's lock while it writes, for ever if the file
    does not take it.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, newest in sys._current_frames().items():
        yield f"\nThread {names.get(ident, '(unknown)')} ({ident}):"
        frame: FrameType | None = newest
        while frame is not None:
            code = frame.f_code
            yield f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_qualname}'
            frame = frame.f_back
