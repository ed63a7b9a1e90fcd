"""Adam's moments in the parameters' own shapes, whatever shards and buckets hold them in memory.

mcore's `fully_reshardable` state addresses its buckets without their padding by offsets that count
it, keeps float32 only, and holds the parameters a second time. Here the data × context ranks lay
their pieces into tensors of the parameters' shapes instead, so a state fits any layout of
processes and buckets.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from ttt_megatron.parallel.groups import Groups
from ttt_megatron.training.sharding import joined, sharded

MOMENTS = ("exp_avg", "exp_avg_sq")
NamedParameters = list[tuple[str, nn.Parameter]]
Moments = dict[str, dict[str, torch.Tensor]]
ShardedMoments = dict[str, dict[str, list[ShardedTensor]]]


class AdamShards(ABC):
    """Reads and writes moments of which each of a group's ranks holds pieces."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group` holds the ranks among which the pieces are spread."""
        self._group = group

    @abstractmethod
    def set_updates(self, updates: int) -> None:
        """Sets Adam's count of updates, which its bias correction reads."""

    @abstractmethod
    def _owned(self, parameter: nn.Parameter) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        """The range of the flattened parameter that this rank owns, and its state; perhaps none."""

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this rank owns any of the parameter's moments."""
        return any(True for _ in self._owned(parameter))

    def gather(self, parameters: NamedParameters) -> Moments:
        """Moments in the parameters' shapes, on the CPU, each on one rank of the group in turn.

        Collective.
        """
        gathered: Moments = {}
        for index, (name, parameter) in enumerate(parameters):
            keeper = index % self._group.size()
            for moment in MOMENTS:
                # Each element is one rank's value plus the others' zeros, so the sum is exact.
                whole = torch.zeros(
                    parameter.numel(), dtype=parameter.dtype, device=parameter.device
                )
                for owned, state in self._owned(parameter):
                    whole[owned] = state[moment]
                dist.reduce(whole, dst=dist.get_global_rank(self._group, keeper), group=self._group)
                if self._group.rank() == keeper:
                    gathered.setdefault(name, {})[moment] = whole.view_as(parameter).cpu()
        return gathered

    def scatter(self, parameters: NamedParameters, moments: Moments) -> None:
        """Takes the pieces this rank owns from moments in the parameters' shapes."""
        for name, parameter in parameters:
            for owned, state in self._owned(parameter):
                for moment in MOMENTS:
                    state[moment].copy_(moments[name][moment].flatten()[owned])


class AdamState(AdamShards):
    """The moments that mcore's distributed optimizers keep in shards."""

    def __init__(self, optimizer: MegatronOptimizer, group: dist.ProcessGroup) -> None:
        """`group` holds the data × context ranks among which the shards are spread."""
        super().__init__(group)
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self._optimizers: list[DistributedOptimizer] = list(chained)
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
        for optimizer in self._optimizers:
            inner = optimizer.optimizer
            for group in inner.param_groups:
                if not isinstance(inner, torch.optim.AdamW):
                    group["step"] = updates  # the fused optimizers count by group
                    continue
                for shard in group["params"]:
                    # torch's fused kernels read it on the device.
                    where = shard.device if group["fused"] else "cpu"
                    inner.state[shard]["step"] = torch.full(
                        (), updates, dtype=torch.float32, device=where
                    )

    def _owned(self, parameter: nn.Parameter) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
        for optimizer in self._optimizers:
            if parameter in optimizer.model_param_gbuf_map:
                owned = optimizer._get_model_param_range_map(parameter)["param"]
                group, position = optimizer.model_param_group_index_map[parameter]
                shard = optimizer.optimizer.param_groups[group]["params"][position]
                yield slice(owned.start, owned.end), optimizer.optimizer.state[shard]


def sharded_moments(moments: Moments, groups: Groups, replica: int = 0) -> ShardedMoments:
    """mcore's description of moments in the shapes of this rank's parameters."""
    return {
        name: {
            moment: sharded(f"optimizer.{moment}.{name}", name, tensor, groups, replica)
            for moment, tensor in pair.items()
        }
        for name, pair in moments.items()
    }


def joined_moments(loaded: dict[str, dict[str, list[torch.Tensor]]]) -> Moments:
    """Moments in the parameters' shapes from what was loaded by `sharded_moments`."""
    return {
        name: {moment: joined(name, blocks) for moment, blocks in pair.items()}
        for name, pair in loaded.items()
    }


def empty_moments(parameters: NamedParameters) -> Moments:
    """Room for moments, on the CPU."""
    return {
        name: {moment: torch.empty_like(parameter, device="cpu") for moment in MOMENTS}
        for name, parameter in parameters
    }
