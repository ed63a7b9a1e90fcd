"""What a run hands back to whoever started it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended: steps done of all, the newest checkpoint, and what followed it.

    `stop_signal` is the signal that ended it early; `tracking_store` is None without MLflow.
    """

    step: int
    steps: int
    last_loss: float
    checkpoint: str | None
    tracking_store: str | None
    tracking_run: str | None
    stop_signal: int | None
