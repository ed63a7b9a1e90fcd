"""Every step's figures, exactly, one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.metrics_file import METRICS_FILE, cut_metrics

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


class MetricsLog(Callback):
    """Appends to `output/metrics.jsonl`; numbers read back as the very same floats.

    A row's `time` is in seconds since 1970. A resumed run first cuts the file after its
    checkpoint's step, so that no step stands twice. While the disk is full, or the file cannot be
    cut, lines wait in memory.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / METRICS_FILE
        self._file: FileIO | None = None
        self._keep_to: int | None = None
        self._waiting: list[tuple[int, bytes]] = []
        self._written = 0
        self._told = False

    def on_start(self, trainer: Trainer) -> None:
        """Cuts what a lost part of the run left, and opens the file."""
        self._cut(trainer.progress.step)

    def on_rewind(self, trainer: Trainer) -> None:
        """Cuts what the run has gone back from."""
        self._close()
        self._cut(trainer.progress.step)

    def _cut(self, step: int) -> None:
        self._keep_to = step if self._keep_to is None else min(step, self._keep_to)
        self._waiting = [(of, line) for of, line in self._waiting if of <= step]
        self._written = 0  # what stands there of a line is cut too
        self._write_waiting()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Writes the step's line."""
        self._write({"step": record.step, **record.metrics(), "seconds": record.seconds})

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Writes the evaluation's line."""
        self._write({"step": step, **metrics})

    def close(self, trainer: Trainer) -> None:
        """Tries once more to write what waits, and closes the file."""
        self._write_waiting()
        if self._waiting:
            logger.warning("%s lacks the last %d lines", self._path, len(self._waiting))
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a network's file system, which then lacks the last lines
                self._file.close()
            self._file = None

    def _write(self, row: dict[str, Any]) -> None:
        self._waiting.append((row["step"], _line({**row, "time": time.time()}).encode()))
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            if self._file is None and self._keep_to is not None:
                cut_metrics(self._path, self._keep_to)
                # Without a buffer: what a full disk takes of a line is known to the byte.
                self._file = self._path.open("ab", buffering=0)
                self._keep_to = None
            while self._file is not None and self._waiting:
                line = self._waiting[0][1]
                self._written += self._file.write(line[self._written :])
                if self._written == len(line):
                    del self._waiting[0]
                    self._written = 0
        except OSError as error:
            if not self._told:
                logger.warning("%s: %s. Training goes on; lines wait", self._path, error.strerror)
            self._told = True


def _line(row: dict[str, Any]) -> str:
    """JSON knows no nan and no inf: they become null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(clean) + "\n"
