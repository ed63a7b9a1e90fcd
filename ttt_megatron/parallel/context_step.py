"""A training step's passes under context parallelism, around megatron-core's DDP.

The parts' losses add up to the whole loss, and so do their gradients; mcore's DDP averages over
data × context ranks, which divides by the number of context ranks once too often. Like mcore's
own schedules, these multiply the loss by that number.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import Tensor

from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.parallel.context_schedule import one_forward_one_backward
from ttt_megatron.parallel.context_tasks import PartBatch, PartPasses, zigzag_order
from ttt_megatron.parallel.replica import learner_of
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


def zigzag_forward_backward(
    ddp: DistributedDataParallel,
    links: ContextLinks,
    parts: list[Part],
    num_micro_batches: int,
    batch: Callable[[int, int], PartBatch],
    inner_lr: float | None,
    measure: Callable[[LearnerOutput], Measured],
) -> dict[tuple[int, int], Measured]:
    """The same with two parts a rank, by `zigzag_order`; the links must be zigzag ones.

    `batch(i, p)` is part p (of `links.own_parts`) of micro-batch i; returned is what `measure`
    makes of the outputs, by (i, p).
    """
    passes = PartPasses(
        learner=learner_of(ddp),
        parts=dict(zip(links.own_parts, parts, strict=True)),
        batch=batch,
        inner_lr=inner_lr,
        scale=links.size / num_micro_batches,
        measure=measure,
    )
    with megatron_scope():
        with ddp.no_sync():
            passes.run(zigzag_order(num_micro_batches, links.size, links.rank), links)
        # Backward passes of several micro-batches mix, so that no one of them is the last to
        # touch every parameter: reductions start when all are done.
        if ddp.ddp_config.overlap_grad_reduce:
            ddp.start_grad_sync()
        get_model_config(ddp).finalize_model_grads_func([ddp])
    return passes.measured
