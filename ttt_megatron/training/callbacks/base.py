"""What a callback may do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ttt_megatron.resilience.events import Event
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer


class Callback:
    """One concern of a run. Every method does nothing unless overridden.

    Callbacks on several ranks that communicate must stand in the same order on each.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.progress` tells where a resumed run stands."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After each step, before its checkpoint."""

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """After an evaluation."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint has its final name."""

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """After something that is worth telling: a skipped step, a slow rank."""

    def on_rewind(self, trainer: Trainer) -> None:
        """After the run has gone back to `trainer.checkpoint`, whose step is the last done now."""

    def on_alive(self, trainer: Trainer) -> None:
        """Now and then while something takes longer than a step, as long as it goes well."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or the one at which the run was asked to stop; not after errors."""

    def close(self, trainer: Trainer) -> None:
        """Last of all, after errors too: release threads, files and handlers."""
