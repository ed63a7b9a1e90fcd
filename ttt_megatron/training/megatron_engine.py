"""The engine on megatron-core's data-parallel wrapper and distributed optimizer (ZeRO-1)."""

from collections.abc import Sequence
from typing import Any

from megatron.core.utils import get_model_config
from torch import Tensor

from ttt_megatron.config.schema import RunConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import learner_of, replicate, settle_parameters
from ttt_megatron.training.clock import PassesClock
from ttt_megatron.training.engine import Update
from ttt_megatron.training.optimizer import build_optimizer
from ttt_megatron.training.passes import forward_backward


class MegatronEngine:
    """An `Engine` for every layout."""

    def __init__(self, learners: Sequence[Learner], config: RunConfig, groups: Groups) -> None:
        """The learners, on the CPU, are moved to this rank's device."""
        self._groups = groups
        moved = [learner.to(groups.device) for learner in learners]
        self._chunks = replicate(moved, config.model, config.parallel)
        self._clock = PassesClock(groups.device)
        shared = get_model_config(self._chunks[0])
        shared.finalize_model_grads_func = self._clock.stopped_by(shared.finalize_model_grads_func)
        self._optimizer = build_optimizer(self._chunks, config.optimizer, config.training.steps)

    @property
    def adam(self) -> str:
        """As `Engine` says."""
        return str(self._optimizer.adam)

    @property
    def passes_seconds(self) -> float:
        """As `Engine` says."""
        return self._clock.seconds

    @property
    def learners(self) -> list[Learner]:
        """This rank's parts of the model, in their order."""
        return [learner_of(chunk) for chunk in self._chunks]

    def zero_grad(self) -> None:
        """Clears the gradient buffers."""
        self._optimizer.zero_grad()

    def forward_backward(
        self, micro_batches: Sequence[Batch], inner_lr: float
    ) -> list[dict[str, Tensor]]:
        """As `Engine` says, in the order that the layout asks for."""
        self._clock.start()
        return forward_backward(self._chunks, micro_batches, inner_lr, self._groups)

    def step(self, step: int) -> Update:
        """As `Engine` says."""
        return self._optimizer.step(step)

    def settle(self) -> None:
        """Waits for parameter gathers under way."""
        for chunk in self._chunks:
            settle_parameters(chunk)

    def state_to_save(self, groups: Groups) -> dict[str, Any]:
        """As `Engine` says."""
        return self._optimizer.state_to_save(groups)

    def state_to_load(self, groups: Groups) -> dict[str, Any]:
        """As `Engine` says."""
        return self._optimizer.state_to_load(groups)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Engine` says."""
        self._optimizer.load_state_dict(state)
