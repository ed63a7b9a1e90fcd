"""SIGTERM and SIGINT end a run after its current step, with a checkpoint."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(Callback):
    """Asks the trainer to stop. A launcher that takes Ctrl-C itself has SIGINT ignored here."""

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Puts the handlers in place."""

        def ask(number: int, frame: FrameType | None) -> None:
            trainer.stop_signal = number

        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, ask)

    def on_end(self, trainer: Trainer) -> None:
        """Says how to go on."""
        if not trainer.finished and trainer.parts.groups.is_main:
            logger.warning(
                "stopped after step %d of %d, saved in %s; the same command goes on from there",
                trainer.progress.step,
                trainer.config.training.steps,
                trainer.checkpoint,
            )

    def close(self, trainer: Trainer) -> None:
        """Restores the handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
