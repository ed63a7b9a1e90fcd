"""The engine on DeepSpeed's ZeRO stages 1 and 2, for data-parallel runs.

Stage 1 spreads Adam's moments over the ranks and reduces gradients once a step; stage 2 also
spreads the gradients, and reduces those of every micro-batch as they come. Clip and schedule are
done here: DeepSpeed's clip divides by the norm plus 1e-6.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ttt_megatron.config.schema import OptimizerConfig, RunConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.meta.part import WHOLE
from ttt_megatron.model.decay import decays
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.training.clock import PassesClock
from ttt_megatron.training.deepspeed_setup import start_deepspeed
from ttt_megatron.training.engine import Update
from ttt_megatron.training.optimizer_state import (
    MOMENTS,
    AdamShards,
    NamedParameters,
    empty_moments,
    joined_moments,
    sharded_moments,
)
from ttt_megatron.training.schedule import learning_rate
from ttt_megatron.training.step import measure


class DeepSpeedEngine:
    """An `Engine` for runs whose processes are all replicas, with float32 parameters.

    In stage 2 gradients are sent in the order in which the backward pass finishes them, so all
    ranks must run the same graph. Learners do: theirs depends on the batch's shape alone.
    """

    def __init__(self, learner: Learner, config: RunConfig, groups: Groups) -> None:
        """The learner, on the CPU, is moved to this rank's device."""
        self._learner = learner.to(groups.device)
        self._config = config.optimizer
        self._total_steps = config.training.steps
        self._adam = _adam(learner, config.optimizer)
        self._deepspeed = start_deepspeed(
            _Passes(learner), self._adam, config.optimizer.zero_stage, groups
        )
        self._zero = self._deepspeed.optimizer
        self._state = ZeroState(self._adam, parallel_state.get_data_parallel_group())
        self._updates = 0
        self._clock = PassesClock(groups.device)

    @property
    def adam(self) -> str:
        """As `Engine` says."""
        return "torch (DeepSpeed is given torch's)"

    @property
    def passes_seconds(self) -> float:
        """As `Engine` says; DeepSpeed reduces within them."""
        return self._clock.seconds

    @property
    def learners(self) -> list[Learner]:
        """The model."""
        return [self._learner]

    def zero_grad(self) -> None:
        """Clears what a step that was not made left."""
        self._zero.zero_grad()

    def forward_backward(
        self, micro_batches: Sequence[Batch], inner_lr: float
    ) -> list[dict[str, Tensor]]:
        """As `Engine` says."""
        all_measured, last = [], len(micro_batches) - 1
        self._clock.start()
        for index, batch in enumerate(micro_batches):
            self._deepspeed.set_gradient_accumulation_boundary(index == last)
            loss, measured = self._deepspeed(batch, inner_lr)
            self._deepspeed.backward(loss / len(micro_batches), scale_wrt_gas=False)
            all_measured.append(measured)
        self._clock.stop()
        return all_measured

    @torch.no_grad()
    def step(self, step: int) -> Update:
        """As `Engine` says."""
        rate = learning_rate(self._config, step, self._total_steps)
        # By parameter group, this rank's part of the gradient, with zeros where it is padded.
        gradients = [g for group in self._zero.averaged_gradients.values() for g in group]
        norm = self._norm(gradients)
        if not math.isfinite(norm):
            return Update(grad_norm=norm, learning_rate=rate, applied=False)
        clip = self._config.clip_grad
        if clip > 0 and norm >= clip:
            torch._foreach_mul_(gradients, clip / norm)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._deepspeed.step()
        self._updates += 1
        return Update(grad_norm=norm, learning_rate=rate, applied=True)

    def _norm(self, gradients: list[Tensor]) -> float:
        """L2 norm over all ranks' parts, summed in float64."""
        squares = torch.zeros((), dtype=torch.float64, device=self._zero.device)
        for gradient in gradients:
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        dist.all_reduce(squares)
        return math.sqrt(squares.item()) if squares.isfinite() else math.nan

    def settle(self) -> None:
        """Nothing is under way between steps."""

    def state_to_save(self, groups: Groups) -> dict[str, Any]:
        """As `Engine` says."""
        moments = sharded_moments(self._state.gather(self._parameters()), groups)
        # No key at all where there are none: plain values must be equal on all ranks.
        return {"updates": self._updates} | ({"moments": moments} if moments else {})

    def state_to_load(self, groups: Groups) -> dict[str, Any]:
        """As `Engine` says."""
        owned = [pair for pair in self._parameters() if self._state.owns(pair[1])]
        return {"moments": sharded_moments(empty_moments(owned), groups, groups.copy_rank)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what dist_checkpointing loaded, the parameters having been set already."""
        self._zero.refresh_fp32_params()
        self._state.scatter(self._parameters(), joined_moments(state.get("moments", {})))
        self._updates = int(state["updates"])
        self._state.set_updates(self._updates)

    def _parameters(self) -> NamedParameters:
        return list(self._learner.named_parameters())


class _Passes(nn.Module):
    """What DeepSpeed calls: it looks for the loss among a tuple's tensors."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch, inner_lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's loss and measurements."""
        output = self.learner(batch.tokens, batch.targets, batch.mask, inner_lr)
        return output.loss, measure(output, WHOLE)


class ZeroState(AdamShards):
    """The moments of DeepSpeed's ZeRO stages 1 and 2.

    A rank owns a range of each parameter group laid flat, whose state it keeps as one tensor.
    """

    def __init__(self, adam: torch.optim.AdamW, group: dist.ProcessGroup) -> None:
        """`adam` is the optimizer that was given to DeepSpeed, `group` holds the replicas."""
        super().__init__(group)
        self._adam = adam
        # Zero moments from the start: a state exists to be saved or loaded before any update.
        for part in self._parts():
            self._adam.state[part] = {
                moment: torch.zeros_like(part, requires_grad=False) for moment in MOMENTS
            }
        self.set_updates(0)

    def _parts(self) -> list[Tensor]:
        """This rank's range of every parameter group."""
        return [group["params"][0] for group in self._adam.param_groups]

    def set_updates(self, updates: int) -> None:
        """As `AdamShards` says."""
        for part in self._parts():
            self._adam.state[part]["step"] = torch.tensor(float(updates), dtype=torch.float32)

    def _owned(self, parameter: nn.Parameter) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        place: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if place is not None:
            inside, part = place.lp_fragment_address, place.hp_fragment_address
            state = self._adam.state[self._parts()[place.param_group_index]]
            owned = {m: state[m][part.start : part.start + part.numel] for m in MOMENTS}
            yield slice(inside.start, inside.start + inside.numel), owned


def _adam(learner: Learner, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the learner's parameters, those that do not decay in a group of their own."""
    parameters = list(learner.parameters())
    shrunk = [p for p in parameters if decays(p, config)]
    kept = [p for p in parameters if not decays(p, config)]
    groups = [{"params": shrunk, "weight_decay": config.weight_decay}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
    )
