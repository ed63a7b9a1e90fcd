"""Beginning, end and mishaps of a run, written down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.resilience.events import Event, record_event
from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.trainer import Trainer


class EventLog(Callback):
    """Appends to `output/events.jsonl`; for the main rank."""

    def __init__(self, output: Path) -> None:
        self._output = output

    def on_start(self, trainer: Trainer) -> None:
        """Where it begins."""
        step = trainer.progress.step
        if trainer.checkpoint is None:
            self._record(Event(kind="started", message="from the start", step=step))
        else:
            self._record(Event(kind="resumed", message=f"from {trainer.checkpoint}", step=step))

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """What the trainer or another callback tells."""
        self._record(event)

    def on_end(self, trainer: Trainer) -> None:
        """Where it ends."""
        progress, total = trainer.progress, trainer.config.training.steps
        if trainer.finished:
            message = f"after {progress.step} steps, {progress.skipped} of them skipped"
            self._record(Event(kind="finished", message=message, step=progress.step))
        else:
            message = f"after step {progress.step} of {total}, saved in {trainer.checkpoint}"
            self._record(Event(kind="stopped", message=message, step=progress.step))

    def _record(self, event: Event) -> None:
        record_event(self._output, event)
