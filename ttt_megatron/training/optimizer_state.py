"""Adam's moments in the parameters' own shapes, whatever shards and buckets hold them in memory.

mcore's `fully_reshardable` state addresses its buckets without their padding by offsets that count
it, keeps float32 only, and holds the parameters a second time. Here each rank lays its pieces into
the full tensor instead, so a state fits any data-parallel size and bucket layout.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
NamedParameters = list[tuple[str, nn.Parameter]]
Moments = dict[str, dict[str, torch.Tensor]]


class AdamState:
    """Reads and writes the moments that mcore's distributed optimizers keep in shards."""

    def __init__(self, optimizer: MegatronOptimizer, group: dist.ProcessGroup) -> None:
        """`group` holds the data-parallel ranks among which the shards are spread."""
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self._optimizers: list[DistributedOptimizer] = list(chained)
        self._group = group
        self._allocate()

    def _allocate(self) -> None:
        """Zero moments from the start: a state exists to be saved or loaded before any update."""
        for optimizer in self._optimizers:
            for group in optimizer.optimizer.param_groups:
                for shard in group["params"]:
                    state = optimizer.optimizer.state[shard]
                    for moment in MOMENTS:
                        state[moment] = torch.zeros_like(shard, requires_grad=False)
        self.set_updates(0)

    def set_updates(self, updates: int) -> None:
        """Sets Adam's count of updates, which its bias correction reads."""
        for optimizer in self._optimizers:
            inner = optimizer.optimizer
            for group in inner.param_groups:
                if not isinstance(inner, torch.optim.AdamW):
                    group["step"] = updates  # the fused optimizers count by group
                    continue
                for shard in group["params"]:
                    inner.state[shard]["step"] = torch.tensor(float(updates), dtype=torch.float32)

    def _owned(self, parameter: nn.Parameter) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """The range of the flattened parameter that this rank owns, and its state; perhaps none."""
        for optimizer in self._optimizers:
            if parameter in optimizer.model_param_gbuf_map:
                owned = optimizer._get_model_param_range_map(parameter)["param"]
                group, position = optimizer.model_param_group_index_map[parameter]
                shard = optimizer.optimizer.param_groups[group]["params"][position]
                yield slice(owned.start, owned.end), optimizer.optimizer.state[shard]

    def gather(self, parameters: NamedParameters) -> Moments:
        """Every parameter's moments, whole, on the first rank; nothing elsewhere. Collective."""
        first = dist.get_global_rank(self._group, 0)
        gathered: Moments = {}
        for name, parameter in parameters:
            for moment in MOMENTS:
                # Each element is one rank's value plus the others' zeros, so the sum is exact.
                whole = torch.zeros(
                    parameter.numel(), dtype=parameter.dtype, device=parameter.device
                )
                for owned, state in self._owned(parameter):
                    whole[owned] = state[moment]
                dist.reduce(whole, dst=first, group=self._group)
                if dist.get_rank() == first:
                    gathered.setdefault(name, {})[moment] = whole.view_as(parameter).cpu()
        return gathered

    def scatter(self, parameters: NamedParameters, moments: Moments) -> None:
        """Takes from whole moments, present on every rank, the pieces this rank owns."""
        for name, parameter in parameters:
            for moment in MOMENTS:
                for owned, state in self._owned(parameter):
                    state[moment].copy_(moments[name][moment].flatten()[owned])


def sharded_moments(moments: Moments, replica: int) -> dict[str, dict[str, ShardedTensor]]:
    """mcore's description of whole moments, of which `replica` 0 is the one that is written."""
    return {
        name: {
            moment: ShardedTensor.from_rank_offsets(
                f"optimizer.{moment}.{name}", tensor, replica_id=(0, 0, replica)
            )
            for moment, tensor in pair.items()
        }
        for name, pair in moments.items()
    }


def empty_moments(parameters: NamedParameters) -> Moments:
    """Room for whole moments, on the CPU."""
    return {
        name: {moment: torch.empty_like(parameter, device="cpu") for moment in MOMENTS}
        for name, parameter in parameters
    }
