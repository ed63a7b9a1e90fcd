"""Every step's figures, exactly, one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


class MetricsLog(Callback):
    """Appends to `output/metrics.jsonl`; numbers read back as the very same floats.

    A row's `time` is in seconds since 1970. A resumed run first cuts the file after its
    checkpoint's step, so that no step stands twice. While the disk is full, lines wait in memory.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / METRICS_FILE
        self._file: FileIO | None = None
        self._waiting = b""
        self._told = False

    def on_start(self, trainer: Trainer) -> None:
        """Cuts what a lost part of the run left, and opens the file."""
        self._cut(trainer)

    def on_rewind(self, trainer: Trainer) -> None:
        """Cuts what the run has gone back from."""
        self.close(trainer)
        self._waiting = b""
        self._cut(trainer)

    def _cut(self, trainer: Trainer) -> None:
        kept = [row for row in read_metrics(self._path) if row["step"] <= trainer.progress.step]
        beside = self._path.with_suffix(".tmp")
        beside.write_text("".join(_line(row) for row in kept))
        os.replace(beside, self._path)
        # Without a buffer: what a full disk takes of a line is known to the byte.
        self._file = self._path.open("ab", buffering=0)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Writes the step's line."""
        self._write({"step": record.step, **record.metrics(), "seconds": record.seconds})

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Writes the evaluation's line."""
        self._write({"step": step, **metrics})

    def close(self, trainer: Trainer) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._waiting += _line({**row, "time": time.time()}).encode()
        try:
            self._waiting = self._waiting[self._file.write(self._waiting) :]
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
