"""What a step tells the callbacks."""

from dataclasses import dataclass

from ttt_megatron.training.engine import Update
from ttt_megatron.training.step import Measurements


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished outer step.

    `step` counts steps done, this one included; `tokens` and `model_flops` are the whole global
    batch's, `seconds` this rank's wall time, in which it computed for `passes_seconds`
    before the gradients were reduced; before that it had waited `data_seconds` for its batch.
    `memory` are its bytes.
    """

    step: int
    measurements: Measurements
    update: Update
    inner_lr: float
    seconds: float
    passes_seconds: float
    data_seconds: float
    memory: float
    tokens: int
    model_flops: float

    def metrics(self) -> dict[str, float]:
        """Everything worth plotting, by name; what does not apply to the run is left out."""
        values = {
            **vars(self.measurements),
            "grad_norm": self.update.grad_norm,
            "learning_rate": self.update.learning_rate,
            "inner_learning_rate": self.inner_lr,
            "tokens_per_second": self.tokens / self.seconds,
            "model_flops_per_second": self.model_flops / self.seconds,
            "memory_bytes": self.memory,
            "skipped": float(not self.update.applied),
        }
        return {name: value for name, value in values.items() if value is not None}
