"""Process groups: one place that starts them, one that ends them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ttt_megatron.config.schema import ParallelConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.accounts import device_error
from ttt_megatron.parallel.context_links import ContextLinks, context_links
from ttt_megatron.parallel.lost_ranks import telling_of_lost_ranks
from ttt_megatron.parallel.meeting import DEFAULT_TIMEOUT, Meeting, meet
from ttt_megatron.parallel.stage_links import StageLinks, stage_links
from ttt_megatron.parallel.standins import install_standins

Check = Callable[[Meeting, torch.device], None]
"""What processes make sure of together when they have met, before any group is made."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This process's place in the run.

    `rank` of `world_size` processes, `data_rank` of `data_size` data-parallel ones. A replica is
    shared by `pipeline_size` × `context_size` × `tensor_size` processes: `pipeline_rank` says which
    blocks this one holds, `context_rank` which part of the sequences it reads, `tensor_rank` which
    part of the matrices it holds. `links` connects it with the other parts of its sequences,
    `stages` with the other blocks, if there are any. `device` is where it computes.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    context_rank: int
    context_size: int
    pipeline_rank: int
    pipeline_size: int
    stages: StageLinks | None
    links: ContextLinks | None
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, manifests and plots."""
        return self.rank == 0

    @property
    def copy_rank(self) -> int:
        """Which of the data × context copies of its parameters this rank holds."""
        return self.data_rank * self.context_size + self.context_rank

    def sum_shares(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the replicas, parts of sequences and stages, in place; returns it.

        Tensor-parallel ranks hold the same values. They all take part, so that every rank gets
        the very same sum and what it decides by it is what the others decide.
        """
        dist.all_reduce(values)
        return values.div_(self.tensor_size)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def union(self, values: set[str]) -> set[str]:
        """What any rank has, on every rank."""
        return set().union(*self.gather_objects(values))

    def settle(self) -> None:
        """Waits until everything sent to other parts and stages has arrived."""
        if self.links is not None:
            self.links.settle()
        if self.stages is not None:
            self.stages.settle()

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises UserError if CUDA is asked for, or given to `auto` by Slurm, and absent, or has fewer
    devices than local processes: a `device_error`.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        if torch.cuda.is_available():
            raise UserError(
                "training.device=cpu cannot be had on a machine with CUDA, where megatron-core "
                "puts its buffers on the GPU: set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
            )
        given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
        if name == "auto" and given != "0":
            raise device_error(
                f"the job has {given} GPUs on this node, and torch finds none: see what nvidia-smi "
                f"says there, or set training.device=cpu to train without them"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise device_error("training.device=cuda, but torch finds no CUDA device: use auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise device_error(
            f"local rank {local_rank} has no GPU of its own: torch finds "
            f"{torch.cuda.device_count()}; start fewer processes on this machine"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_groups(
    device_name: str = "auto", parallel: ParallelConfig | None = None, check: Check | None = None
) -> Iterator[Groups]:
    """Starts torch.distributed and mcore's groups, as `processes` and `layout` do; ends both."""
    with (
        processes(device_name, _timeout(parallel), check) as device,
        layout(device, parallel) as groups,
    ):
        yield groups


def _timeout(parallel: ParallelConfig | None) -> timedelta:
    return DEFAULT_TIMEOUT if parallel is None else timedelta(minutes=parallel.timeout_minutes)


@contextmanager
def processes(
    device_name: str = "auto", timeout: timedelta = DEFAULT_TIMEOUT, check: Check | None = None
) -> Iterator[torch.device]:
    """Starts torch.distributed (gloo on CPU, NCCL on CUDA), ends it on exit; yields the device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Where
    they are absent this is a one-process group of its own. `timeout` is that of every collective.

    Raises UserError as `meet` and `check` do, and LostRankError where another rank is gone or does
    not answer within the timeout.
    """
    install_standins()
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = meet(timeout)
    if check is not None:
        check(meeting, device)
    with telling_of_lost_ranks(meeting):
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", meeting.store),
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timeout,
        )
        try:
            yield device
        finally:
            dist.destroy_process_group()


@contextmanager
def layout(device: torch.device, parallel: ParallelConfig | None = None) -> Iterator[Groups]:
    """mcore's groups for processes that have been started; afterwards others can be made.

    Without `parallel` all processes are data-parallel.

    Raises UserError if there are not as many processes as `parallel` asks for.
    """
    size = dist.get_world_size()
    parallel = parallel or ParallelConfig(data=size)
    if parallel.world_size != size:
        raise UserError(
            f"the recipe's parallel section makes {parallel.world_size} processes, and {size} "
            f"were started: make them equal"
        )
    turns = parallel.virtual_pipeline
    before = groups_made()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=turns if turns > 1 else None,
        distributed_timeout_minutes=parallel.timeout_minutes,
        # A simulated world has none, of gloo or otherwise.
        create_gloo_process_groups=dist.get_backend() != "fake",
    )
    try:
        yield Groups(
            rank=dist.get_rank(),
            world_size=size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_size=parallel.tensor,
            context_rank=parallel_state.get_context_parallel_rank(),
            context_size=parallel.context,
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_size=parallel.pipeline,
            stages=_stage_links(parallel),
            links=_context_links(parallel),
            device=device,
        )
    finally:
        parallel_state.destroy_model_parallel()
        for group in groups_made()[len(before) :]:
            dist.destroy_process_group(group)


def groups_made() -> list[dist.ProcessGroup]:
    """This rank's groups, in the order they were made; torch lists them nowhere in public.

    megatron-core forgets its groups without ending them, and each keeps several threads.
    """
    return list(dist.distributed_c10d._world.pg_map)


def _context_links(parallel: ParallelConfig) -> ContextLinks | None:
    """Links to the other parts of this rank's sequences. Collective."""
    if parallel.context == 1:
        return None
    group = parallel_state.get_context_parallel_group()
    return context_links(group, _timeout(parallel), zigzag=parallel.context_order == "zigzag")


def _stage_links(parallel: ParallelConfig) -> StageLinks | None:
    """Links to the other stages of this rank's pipeline. Collective."""
    if parallel.pipeline == 1:
        return None
    group = parallel_state.get_pipeline_model_parallel_group()
    token_parts = parallel.tensor if parallel.sequence_parallel else 1
    return stage_links(group, parallel.virtual_pipeline, token_parts, _timeout(parallel))
