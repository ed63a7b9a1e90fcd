"""What the trainer asks of whatever holds parameters, gradients and optimizer state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one optimizer step did.

    `grad_norm` is the L2 norm of the whole mean gradient before the clip; `applied` is False where
    it was not finite and nothing changed.
    """

    grad_norm: float
    learning_rate: float
    applied: bool


class Engine(Protocol):
    """This rank's share of the model, its gradients and its optimizer state.

    Every method is collective.
    """

    @property
    def adam(self) -> str:
        """Whose AdamW makes the update, and why."""

    @property
    def passes_seconds(self) -> float:
        """How long the last passes took this rank, before their gradients were reduced."""

    @property
    def learners(self) -> list[Learner]:
        """This rank's parts of the model, in their order; mostly one."""

    def zero_grad(self) -> None:
        """Clears the gradients; call before each step's passes."""

    def forward_backward(
        self, micro_batches: Sequence[Batch], inner_lr: float
    ) -> list[dict[str, Tensor]]:
        """Leaves the mean gradient of the global batch, ready for `step`.

        All micro-batches, on all ranks, have equally many sequences. Returns this rank's shares of
        each one's measurements as 0-d float64 tensors; none where it computes no loss.
        """

    def step(self, step: int) -> Update:
        """Clips the gradient and makes the update that follows `step` earlier ones.

        A gradient that is not finite leaves parameters and moments as they were.
        """

    def settle(self) -> None:
        """Makes every rank's parameters current, before a checkpoint or an evaluation reads."""

    def state_to_save(self, groups: Groups) -> dict[str, Any]:
        """Adam's moments in whole parameters' shapes and the count of updates, for
        dist_checkpointing.save."""

    def state_to_load(self, groups: Groups) -> dict[str, Any]:
        """Where dist_checkpointing.load puts this rank's part of the moments."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what dist_checkpointing loaded."""
