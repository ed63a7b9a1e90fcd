"""Process groups: one place that starts them, one that ends them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ttt_megatron.errors import UserError
from ttt_megatron.parallel.standins import install_standins

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This process's place in the run.

    `rank` of `world_size` processes, `data_rank` of `data_size` data-parallel ones; `device` is
    where it computes.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs, manifests and plots."""
        return self.rank == 0

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The data-parallel group, for collectives on tensors of `device`."""
        return parallel_state.get_data_parallel_group()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the data-parallel ranks, in place; returns it."""
        dist.all_reduce(values, group=self.data_group)
        return values

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

    def barrier(self) -> None:
        """Waits for every rank."""
        dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises UserError if CUDA is asked for and absent, or has fewer devices than local processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        if torch.cuda.is_available():
            raise UserError(
                "training.device=cpu cannot be had on a machine with CUDA, where megatron-core "
                "puts its buffers on the GPU: set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("training.device=cuda, but torch finds no CUDA device: use auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: torch finds "
            f"{torch.cuda.device_count()}; lower parallel.data"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def process_groups(device_name: str = "auto") -> Iterator[Groups]:
    """Starts torch.distributed (gloo on CPU, NCCL on CUDA) and mcore's groups; ends them on exit.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. Where
    they are absent this is a one-process group of its own.
    """
    install_standins()
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT
        )
    try:
        parallel_state.initialize_model_parallel()
        yield Groups(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            device=device,
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
