"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


class ProgressBar(Callback):
    """Step, ETA, loss, tokens a second, model FLOP/s and memory; for the main rank.

    The bar moves every step; lines come every `log_interval` steps, with means since the last.
    """

    def __init__(self, log_interval: int, *, bar: bool, console: Console | None = None) -> None:
        self._interval = log_interval
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if bar and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
        self._since: list[StepRecord] = []
        self._clock = time.perf_counter()

    def on_start(self, trainer: Trainer) -> None:
        """Shows the bar."""
        self._clock = time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(
                trainer.config.name,
                total=trainer.config.training.steps,
                completed=trainer.progress.step,
                figures="",
            )
            self._bar.start()

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Moves the bar, or writes a line when one is due."""
        self._since.append(record)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record.step, figures=self._figures(record))
        total = trainer.config.training.steps
        if record.step % self._interval == 0 or record.step == total:
            if self._bar is None:
                elapsed = time.perf_counter() - self._clock
                left = elapsed / len(self._since) * (total - record.step)
                logger.info(
                    "step %d/%d  %s  ETA %s",
                    record.step,
                    total,
                    self._figures(record),
                    _duration(left),
                )
            self._since, self._clock = [], time.perf_counter()

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Writes the results in a line."""
        logger.info("step %d  %s", step, "  ".join(f"{n} {v:.4f}" for n, v in metrics.items()))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Tells where it is, and for how long training stopped for it."""
        logger.info("saved %s  (training stopped for %.2f s)", path, trainer.seconds_stopped)

    def close(self, trainer: Trainer) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _figures(self, record: StepRecord) -> str:
        seconds = sum(one.seconds for one in self._since)
        tokens = sum(one.tokens for one in self._since) / seconds
        flops = sum(one.model_flops for one in self._since) / seconds
        return (
            f"loss {record.measurements.loss:.4f}  {tokens:,.0f} tok/s  "
            f"{_scaled(flops)}FLOP/s  {_scaled(record.memory)}B"
        )


def _scaled(value: float) -> str:
    """A number with its prefix: 2.1 G."""
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    power = 0
    while value >= 1000 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.1f} {prefixes[power]}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
