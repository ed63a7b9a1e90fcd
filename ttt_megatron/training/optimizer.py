"""The outer optimizer: AdamW on megatron-core's distributed optimizer, clipped and scheduled here.

mcore's own clip divides by the norm plus 1e-6 and takes the norm in float32; its scheduler sets
weight decay only from its first step on. Both are done here instead, exactly, through the two
halves of its step that it offers apart: prepare_grads and step_with_ready_grads.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from ttt_megatron.config.schema import OptimizerConfig
from ttt_megatron.model.decay import decays
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import is_second_copy, learner_of, parameter_dtype
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.training.engine import Update
from ttt_megatron.training.fused import choose_adam, mcore_adam
from ttt_megatron.training.optimizer_state import (
    AdamState,
    Moments,
    NamedParameters,
    empty_moments,
    joined_moments,
    sharded_moments,
)
from ttt_megatron.training.schedule import learning_rate


class OuterOptimizer:
    """AdamW over the shards this rank owns, with the global-norm clip and the schedule.

    `adam` says whose AdamW it is, and why. Raises UserError if the one that is asked for by name is
    not to be had.
    """

    def __init__(
        self,
        model_chunks: Sequence[DistributedDataParallel],
        config: OptimizerConfig,
        total_steps: int,
    ) -> None:
        self._chunks = list(model_chunks)
        self._config = config
        self._total_steps = total_steps
        dtype = parameter_dtype(self._chunks[0])
        self._float64 = dtype == torch.float64
        self.adam = choose_adam(config, self._device, dtype)
        # mcore tells its whole configuration once per optimizer, as a warning-coloured log line.
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        with self._scope(), mcore_adam(self.adam):
            self._mcore = get_megatron_optimizer(
                _mcore_config(config, dtype),
                self._chunks,
                config_overrides=_decay_overrides(config),
            )
        self._adam = AdamState(self._mcore, self._chunks[0].dp_cp_group)
        self._updates = 0

    def _scope(self) -> AbstractContextManager[None]:
        return megatron_scope(float64=self._float64)

    def zero_grad(self) -> None:
        """Clears the gradient buffers; call before each step's first backward pass."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._mcore.zero_grad()

    @torch.no_grad()
    def step(self, step: int) -> Update:
        """Clips the reduced gradients and makes the update that follows `step` earlier ones.

        Collective. A gradient that is not finite leaves parameters and moments as they were.
        """
        rate = learning_rate(self._config, step, self._total_steps)
        with self._scope():
            self._mcore.prepare_grads()
            norm = self._global_norm()
            if not math.isfinite(norm):
                return Update(grad_norm=norm, learning_rate=rate, applied=False)
            clip = self._config.clip_grad
            if clip > 0 and norm >= clip:
                gradients = [p.grad for p in self._mcore.get_parameters() if p.grad is not None]
                torch._foreach_mul_(gradients, clip / norm)
            for group in self._mcore.param_groups:
                group["lr"] = rate
                group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
            self._mcore.step_with_ready_grads()
        self._updates += 1
        return Update(grad_norm=norm, learning_rate=rate, applied=True)

    @property
    def _device(self) -> torch.device:
        return self._chunks[0].buffers[0].grad_data.device

    def _global_norm(self) -> float:
        """L2 norm over all ranks' shards, each parameter once, summed in float64."""
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        for gradient in self._mcore.get_main_grads_for_grad_norm():
            squares += torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
        dist.all_reduce(squares)
        return math.sqrt(squares.item()) if squares.isfinite() else math.nan

    def _parameters(self) -> NamedParameters:
        return [pair for chunk in self._chunks for pair in learner_of(chunk).named_parameters()]

    def gathered_moments(self) -> Moments:
        """Adam's moments in the shapes of this rank's parameters, on the CPU. Collective.

        Each parameter's are on one of the data × context ranks.
        """
        return self._adam.gather(self._parameters())

    def state_to_save(self, groups: Groups) -> dict[str, Any]:
        """Moments and update count for dist_checkpointing.save. Collective."""
        own = {name for name, parameter in self._parameters() if not is_second_copy(parameter)}
        gathered = {n: pair for n, pair in self.gathered_moments().items() if n in own}
        moments = sharded_moments(gathered, groups)
        # No key at all where there are none: plain values must be equal on all ranks.
        return {"updates": self._updates} | ({"moments": moments} if moments else {})

    def state_to_load(self, groups: Groups) -> dict[str, Any]:
        """Where dist_checkpointing.load puts the moments of which this rank owns anything."""
        owned = [pair for pair in self._parameters() if self._adam.owns(pair[1])]
        return {"moments": sharded_moments(empty_moments(owned), groups, groups.copy_rank)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what dist_checkpointing loaded."""
        self._adam.scatter(self._parameters(), joined_moments(state.get("moments", {})))
        self._updates = int(state["updates"])
        self._adam.set_updates(self._updates)


def build_optimizer(
    model_chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, total_steps: int
) -> OuterOptimizer:
    """The outer optimizer of a model in mcore's DDP, float32 or float64."""
    return OuterOptimizer(model_chunks, config, total_steps)


def _mcore_config(config: OptimizerConfig, dtype: torch.dtype) -> McoreOptimizerConfig:
    return McoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.end_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        clip_grad=0.0,
    )


def _decay_overrides(config: OptimizerConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Which parameters do not decay."""
    kept = ParamPredicate(name="decays_not", fn=lambda parameter: not decays(parameter, config))
    return {ParamKey(predicate=kept): ParamGroupOverride(wd_mult=0.0)}
