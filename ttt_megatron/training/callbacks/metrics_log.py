"""Every step's figures, exactly, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

METRICS_FILE = "metrics.jsonl"


class MetricsLog(Callback):
    """Appends to `output/metrics.jsonl`; numbers read back as the very same floats.

    A row's `time` is in seconds since 1970. A resumed run first cuts the file after its
    checkpoint's step, so that no step stands twice.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / METRICS_FILE
        self._file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Cuts what a lost part of the run left, and opens the file."""
        kept = [row for row in read_metrics(self._path) if row["step"] <= trainer.progress.step]
        beside = self._path.with_suffix(".tmp")
        beside.write_text("".join(_line(row) for row in kept))
        os.replace(beside, self._path)
        self._file = self._path.open("a")

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
        if self._file is not None:
            self._file.write(_line({**row, "time": time.time()}))
            self._file.flush()


def _line(row: dict[str, Any]) -> str:
    """JSON knows no nan and no inf: they become null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(clean) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, oldest first; a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
