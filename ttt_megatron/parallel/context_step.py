"""A training step's passes under context parallelism, around megatron-core's DDP."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import Tensor

from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.parallel.context_schedule import one_forward_one_backward
from ttt_megatron.parallel.standins import megatron_scope

Measured = TypeVar("Measured")


def context_forward_backward(
    ddp: DistributedDataParallel,
    links: ContextLinks,
    num_micro_batches: int,
    forward: Callable[[int], tuple[Tensor, Measured]],
) -> list[Measured]:
    """Leaves the mean gradient of the global batch in the DDP's buffers, reduced over the ranks.

    `forward(i)` runs micro-batch i through `ddp` and returns this part's loss and anything else;
    the latter is returned, of all micro-batches. Takes the place of mcore's schedule without
    pipelining, whose last micro-batch is likewise the one that lets the gradients be reduced.
    """
    # The parts' losses add up to the whole loss, and so do their gradients; mcore's DDP averages
    # over data × context ranks, which divides by `size` once too often. Its own schedules make up
    # for that with the same factor.
    scale = links.size / num_micro_batches
    measured: list[Measured] = []

    def run_forward(index: int) -> Tensor:
        loss, other = forward(index)
        measured.append(other)
        return loss

    def run_backward(index: int, loss: Tensor) -> None:
        is_last = index == num_micro_batches - 1
        with nullcontext() if is_last else ddp.no_sync():
            (loss * scale).backward()

    with megatron_scope():
        one_forward_one_backward(num_micro_batches, links, run_forward, run_backward)
        get_model_config(ddp).finalize_model_grads_func([ddp])
    return measured
