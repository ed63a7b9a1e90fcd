"""A training step's passes under context parallelism, around megatron-core's DDP.

The parts' losses add up to the whole loss, and so do their gradients; mcore's DDP averages over
data × context ranks, which divides by the number of context ranks once too often. Like mcore's
own schedules, these multiply the loss by that number.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import Tensor

from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.meta.part import Part
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.parallel.context_schedule import one_forward_one_backward
from ttt_megatron.parallel.context_tasks import (
    DEBTS,
    SHARES,
    PartBatch,
    PartPasses,
    zigzag_order,
)
from ttt_megatron.parallel.replica import learner_of
from ttt_megatron.parallel.stage_links import StageLinks
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.planning.schedules import PhaseSeconds

Measured = TypeVar("Measured")


def context_forward_backward(
    ddp: DistributedDataParallel,
    links: ContextLinks,
    part: Part,
    batch_sizes: Sequence[int],
    forward: Callable[[int], tuple[Tensor, Measured]],
    stages: StageLinks | None = None,
) -> list[Measured]:
    """Leaves the mean gradient of the global batch in the DDP's buffers, reduced over the ranks.

    `forward(i)` runs micro-batch i, of `batch_sizes[i]` sequences, through `ddp` and returns this
    part's loss and anything else; the latter is returned, of all micro-batches. Where `ddp` holds
    a pipeline stage but the last, it returns the stream that leaves it, and what came in is
    `stages`' too. Takes the place of mcore's schedules, whose last micro-batch is likewise the one
    that lets the gradients be reduced.
    """
    num_micro_batches = len(batch_sizes)
    scale = links.size / num_micro_batches
    ahead = links.size - 1 - links.rank
    ends_here = stages is None or stages.is_last
    if stages is not None:
        ahead += stages.size - 1 - stages.rank
    measured: list[Measured] = []

    def run_forward(index: int) -> Tensor:
        out, other = forward(index)
        if ends_here:
            measured.append(other)
        else:
            assert stages is not None
            stages.send_stream(out)
        return out

    def run_backward(index: int, out: Tensor) -> None:
        is_last = index == num_micro_batches - 1
        with nullcontext() if is_last else ddp.no_sync():
            if ends_here:
                (out * scale).backward()
            else:
                assert stages is not None
                out.backward(stages.receive_cotangent(out))

    relays = ends_here and learner_of(ddp).takes_steps()

    def expect_state(index: int) -> None:
        if relays:
            part.expect_state(batch_sizes[index])

    def expect_cotangent(index: int) -> None:
        if relays:
            part.expect_cotangent(batch_sizes[index])

    with megatron_scope():
        one_forward_one_backward(
            num_micro_batches, ahead, run_forward, run_backward, expect_state, expect_cotangent
        )
        links.settle()
        if stages is not None:
            stages.settle()
        get_model_config(ddp).finalize_model_grads_func([ddp])
    return measured


def zigzag_forward_backward(
    ddp: DistributedDataParallel,
    links: ContextLinks,
    parts: list[Part],
    num_micro_batches: int,
    batch: Callable[[int, int], PartBatch],
    inner_lr: float | None,
    measure: Callable[[LearnerOutput, Part], Measured],
    seconds: PhaseSeconds = SHARES,
    debts: int | None = DEBTS,
) -> dict[tuple[int, int], Measured]:
    """The same with two parts a rank, by `zigzag_order`; the links must be zigzag ones.

    `batch(i, p)` is part p (of `links.own_parts`) of micro-batch i; returned is what `measure`
    makes of the outputs and their parts, by (i, p). `seconds` and `debts` are the order's: which
    backward passes are split, and of how many parts slow weights' gradients are put off at a time.
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
            order = zigzag_order(num_micro_batches, links.size, links.rank, seconds, debts)
            passes.run(order, links)
        # Backward passes of several micro-batches mix, so that no one of them is the last to
        # touch every parameter, and gradients that were put off run no hooks: reductions start
        # when all are done.
        if ddp.ddp_config.overlap_grad_reduce:
            ddp.start_grad_sync()
        get_model_config(ddp).finalize_model_grads_func([ddp])
    return passes.measured
