"""A process that waits in vain says where, and ends.

A collective that not all ranks come to, a file system that does not answer, a kernel that never
returns: all look the same from outside. Every rank has a watchdog of its own, so that each writes
down its stack while it still hangs, and whoever started them starts them again.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
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
# The ranks do not begin to wait at the same moment: none is to end before the others have written.
_GRACE_SECONDS = 3.0


class HungError(WorkerError):
    """No step, evaluation or checkpoint was finished for longer than faults.hang_minutes."""


class Watchdog(Callback):
    """Ends this process when nothing is finished for `limit` seconds, and writes its stacks.

    They are in `output/stacks`, of all threads. Starts with the first step: what comes
    before has time limits of its own. Time during which the whole process was suspended, as a
    batch system may do, does not count.
    """

    def __init__(self, output: Path, limit: float) -> None:
        self._folder = output / STACKS
        self._output = output
        self._limit = limit
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
        pause = min(self._limit / _LOOKS_A_LIMIT, _LONGEST_PAUSE)
        waited, signs, before = 0.0, self._signs, time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            waited += min(now - before, 2 * pause)
            before = now
            if signs != self._signs:
                waited, signs = 0.0, self._signs
            if waited > self._limit:
                self._end(waited)

    def _end(self, waited: float) -> None:
        with suppress(OSError):
            self._write_stacks(waited)
        if self._stop.wait(_GRACE_SECONDS):
            return
        message = self._message(waited)
        record_event(self._output, Event(kind="hung", message=message, step=self._step))
        leave_account(HungError(message))
        sys.stderr.flush()
        os._exit(_EXIT_HUNG)

    def _write_stacks(self, waited: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        with path.open("w", encoding="utf-8") as file:
            file.write(
                f"process {os.getpid()} on {socket.gethostname()}: nothing finished for "
                f"{waited:.0f} s after step {self._step}\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _message(self, waited: float) -> str:
        silent = [rank for rank in range(self._world) if not self._has_written(rank)]
        lacking = ""
        if silent:
            names = ", ".join(map(str, silent))
            lacking = f"; rank {names} wrote nothing and may be stopped or gone"
        return (
            f"nothing finished for {waited:.0f} s after step {self._step} (faults.hang_minutes); "
            f"where the ranks stood is in {self._folder}{lacking}. The same command goes on from "
            f"the last checkpoint"
        )

    def _has_written(self, rank: int) -> bool:
        paths = self._folder.glob(f"rank-{rank}-*.txt")
        return any(path.stat().st_mtime >= self._began for path in paths)
