"""An alarm where fast weights run away from where they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer


class DriftAlarm(Callback):
    """Tells, once each time it is passed, that ‖W_N − W_0‖/‖W_0‖ is above `limit`."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._above = False

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Looks at the step's mean over sequences; a run without inner steps has none."""
        drift = record.measurements.drift
        if drift is None:
            return
        if drift > self._limit and not self._above:
            trainer.tell(
                "drift",
                f"fast weights end a sequence {drift:.2f} times their norm away from where they "
                f"began it (faults.drift_alarm={self._limit:g}): look at inner.lr and inner.clip, "
                f"and at the loss of the last chunks",
            )
        self._above = drift > self._limit
