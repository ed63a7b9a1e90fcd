"""The dashboard at the end of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Dashboard(Callback):
    """Writes `output/dashboard.html` and `.png` after the last step; for the main rank.

    A run that was asked to stop has its end to save for, and `ttt-megatron dashboard` for this.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def on_end(self, trainer: Trainer) -> None:
        """Draws the whole run; a failure is told and does no harm."""
        if not trainer.finished:
            return
        from ttt_megatron.training.dashboard.history import read_history
        from ttt_megatron.training.dashboard.page import write_dashboard

        folder = Path(self._config.training.output)
        try:
            write_dashboard(read_history(folder, self._config), folder)
        except Exception as error:
            logger.warning("no dashboard was written: %s: %s", type(error).__name__, error)
