"""Any rank of a run in this process, by torch's fake process groups, and all ranks' groups."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from ttt_megatron.config.schema import ParallelConfig
from ttt_megatron.parallel.groups import Groups, layout
from ttt_megatron.parallel.standins import install_standins

KINDS = {"tensor": "tp", "context": "cp", "data": "dp", "pipeline": "pp", "data x context": "dp-cp"}
"""Kinds of groups by megatron-core's names of what varies within one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands in its groups."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class World:
    """All ranks: `groups` by kind, each in the order of its members, and every rank's place."""

    size: int
    groups: dict[str, list[list[int]]]
    places: list[Place]

    def at(self, **place: int) -> Place:
        """The first rank in this place; what is not named is 0."""
        wanted = {"tensor": 0, "context": 0, "data": 0, "pipeline": 0} | place
        return next(
            one for one in self.places if all(getattr(one, k) == v for k, v in wanted.items())
        )


@contextmanager
def as_rank(
    rank: int, size: int, parallel: ParallelConfig, device: torch.device
) -> Iterator[Groups]:
    """This process as one rank of so many, its groups made by the code that ranks run.

    Collectives return at once and tell nothing. Raises UserError if `parallel` makes another number
    of processes. No process group may stand.
    """
    install_standins()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with layout(device, parallel) as groups:
            yield groups
    finally:
        dist.destroy_process_group()


def build_world(parallel: ParallelConfig) -> World:
    """Groups and places of all ranks, numbered as megatron-core numbers them.

    Raises RuntimeError unless the groups of every kind hold each rank once.
    """
    order = inspect.signature(parallel_state.initialize_model_parallel).parameters["order"].default
    generator = parallel_state.RankGenerator(
        tp=parallel.tensor,
        ep=1,
        dp=parallel.data,
        pp=parallel.pipeline,
        cp=parallel.context,
        order=order,
    )
    size = parallel.world_size
    groups = {kind: generator.get_ranks(token) for kind, token in KINDS.items()}
    for kind, found in groups.items():
        if sorted(rank for ranks in found for rank in ranks) != list(range(size)):
            raise RuntimeError(f"the {kind} groups {found} do not hold each of {size} ranks once")
    within = {
        kind: {rank: index for ranks in found for index, rank in enumerate(ranks)}
        for kind, found in groups.items()
    }
    places = [
        Place(
            rank=rank,
            tensor=within["tensor"][rank],
            context=within["context"][rank],
            data=within["data"][rank],
            pipeline=within["pipeline"][rank],
        )
        for rank in range(size)
    ]
    return World(size=size, groups=groups, places=places)


def check_place(world: World, groups: Groups) -> None:
    """Raises RuntimeError unless a rank's own groups are the world's."""
    place = world.places[groups.rank]
    own = Place(
        rank=groups.rank,
        tensor=groups.tensor_rank,
        context=groups.context_rank,
        data=groups.data_rank,
        pipeline=groups.pipeline_rank,
    )
    made = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data x context": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    if own != place:
        raise RuntimeError(f"rank {groups.rank} stands at {own}, and {place} was derived")
    for kind, group in made.items():
        ranks = dist.get_process_group_ranks(group)
        if ranks not in world.groups[kind]:
            raise RuntimeError(f"rank {groups.rank}: its {kind} group {ranks} was not derived")
