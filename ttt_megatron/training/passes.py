"""The forward and backward passes of an outer step, in the order that the layout asks for."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import LearnerOutput
from ttt_megatron.parallel.context_links import ContextLinks
from ttt_megatron.parallel.context_step import context_forward_backward, zigzag_forward_backward
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import learner_of, wait_for_parameters
from ttt_megatron.parallel.standins import megatron_scope
from ttt_megatron.training.parts import own_parts
from ttt_megatron.training.step import measure

Measured = dict[str, Tensor]


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[Batch],
    inner_lr: float,
    groups: Groups,
) -> list[Measured]:
    """Leaves the mean gradient of the global batch in the DDP's buffers, reduced over the ranks.

    `chunks` are this rank's pipeline stages, one without pipelining. All micro-batches, on all
    ranks, have equally many sequences; ranks that share sequences are given the same ones and read
    their parts. Returns each one's measurements, or this part's shares of them, as 0-d float64
    tensors; nothing where a rank does not hold the last stage. Collective; the gradient buffers
    must be clear.
    """
    for chunk in chunks:
        wait_for_parameters(chunk)
    if groups.links is not None and groups.links.zigzag:
        return _in_zigzag(chunks[0], micro_batches, inner_lr, groups.links)
    if groups.links is not None and len(chunks) == 1:
        return _in_own_order(chunks[0], micro_batches, inner_lr, groups)
    return _in_mcore_order(chunks, micro_batches, inner_lr, groups)


def _run(
    chunk: DistributedDataParallel, batch: Batch, inner_lr: float, groups: Groups
) -> tuple[Tensor, Measured]:
    """One micro-batch's loss and measurements, or the stream that leaves the stage and nothing."""
    [own] = own_parts(batch, groups.links, learner_of(chunk))
    output: LearnerOutput | Tensor = chunk(*own.tensors, inner_lr, own.part)
    if isinstance(output, Tensor):
        return output, {}
    # Measured before a schedule divides the loss by the number of micro-batches, in place.
    return output.loss, measure(output, own.part)


def _in_own_order(
    chunk: DistributedDataParallel,
    micro_batches: Sequence[Batch],
    inner_lr: float,
    groups: Groups,
) -> list[Measured]:
    """Parts of sequences, and stages if there are any, as one chain of ranks."""
    assert groups.links is not None
    stages, learner = groups.stages, learner_of(chunk)

    def forward(index: int) -> tuple[Tensor, Measured]:
        batch = micro_batches[index]
        if stages is not None and not stages.is_first:
            [own] = own_parts(batch, groups.links, learner)
            width = learner.model.config.hidden_size
            stream = stages.receive_stream(own.tokens, width, learner.compute_dtype)
            chunk.module.set_input_tensor(stream)
        return _run(chunk, batch, inner_lr, groups)

    [own] = own_parts(micro_batches[0], groups.links, learner)
    sizes = [len(batch) for batch in micro_batches]
    return context_forward_backward(chunk, groups.links, own.part, sizes, forward, stages)


def _in_zigzag(
    chunk: DistributedDataParallel,
    micro_batches: Sequence[Batch],
    inner_lr: float,
    links: ContextLinks,
) -> list[Measured]:
    """Two parts of every sequence a rank; what it measures of both is added up."""
    own = [own_parts(batch, links, learner_of(chunk)) for batch in micro_batches]
    places = {index: place for place, index in enumerate(links.own_parts)}
    measured = zigzag_forward_backward(
        chunk,
        links,
        [one.part for one in own[0]],
        len(micro_batches),
        lambda index, part: own[index][places[part]].tensors,
        inner_lr,
        measure,
    )
    return [
        {
            name: torch.stack([measured[index, part][name] for part in places]).sum(0)
            for name in measured[index, links.own_parts[0]]
        }
        for index in range(len(micro_batches))
    ]


def _in_mcore_order(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[Batch],
    inner_lr: float,
    groups: Groups,
) -> list[Measured]:
    """megatron-core's schedules: without pipelining, 1F1B, or interleaved 1F1B."""

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        out, measured = _run(model, next(batches), inner_lr, groups)
        if measured:
            return out, lambda loss: (loss, measured)
        # The schedules send tensors of the shape [T, b, H]; this one has as many elements.
        batch, length, width = out.shape
        return out.contiguous().view(length, batch, width), None

    iterators = [iter(micro_batches) for _ in chunks]
    with megatron_scope():
        measured: list[Measured] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=len(micro_batches[0]),
        )
    return list(measured)
