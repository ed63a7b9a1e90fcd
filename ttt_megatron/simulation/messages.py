"""The messages of a step between the ranks that share a replica's sequences and blocks.

Every rank's passes run as in training, on a model as narrow and sequences as short as leave the
order and the partners of messages as they are; what is sent is matched with what is received.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch import nn

from ttt_megatron.config.schema import ATTENTION_MIXERS, RunConfig
from ttt_megatron.data.stream import Batch
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups
from ttt_megatron.parallel.replica import Replica, transformer_config
from ttt_megatron.simulation.recording import Record, match, recording
from ttt_megatron.simulation.world import World, as_rank
from ttt_megatron.training.passes import forward_backward
from ttt_megatron.training.run import build_learners

_CHUNK = 8


def check_messages(config: RunConfig, world: World, device: torch.device) -> int:
    """The number of messages of a step of the first replica's first tensor-parallel ranks.

    A long step's micro-batches are cut down to a few more than there are ranks in the chain.
    Raises RuntimeError where messages do not meet, or ranks wait for each other for ever.
    """
    parallel = config.parallel
    if parallel.context == parallel.pipeline == 1:
        return 0
    small = narrowed(config)
    records: dict[int, Record] = {}
    for pipeline in range(parallel.pipeline):
        for context in range(parallel.context):
            rank = world.at(pipeline=pipeline, context=context).rank
            with as_rank(rank, world.size, parallel, device) as groups:
                records[rank] = _record(small, groups)
    return match(records)


def narrowed(config: RunConfig) -> RunConfig:
    """The run with as few parameters, tokens and micro-batches as have the same messages.

    Lengths keep their ratios: which parts of a sequence exchange keys and values depends on these.
    """
    model, inner, parallel = config.model, config.inner, config.parallel
    parts = parallel.context * (2 if parallel.context_order == "zigzag" else 1)
    part = config.data.sequence_length * _CHUNK // (inner.chunk_size * parts)
    window = model.window_size
    if window is not None:
        window = max(1, window * _CHUNK // inner.chunk_size)
    chunk = part if window is None else math.gcd(part, window)
    if chunk % _CHUNK:
        chunk = _CHUNK
    stages = parallel.pipeline * parallel.virtual_pipeline
    suffix = min(model.num_suffix_layers, 2)
    known = set(model.mixer_kinds) <= set(ATTENTION_MIXERS)
    heads = 2 * parallel.tensor
    chain = parallel.context + parallel.pipeline
    number = config.training.global_batch_size // (parallel.data * config.training.micro_batch_size)
    number = min(number, parallel.pipeline * -(-(chain + 1) // parallel.pipeline))
    return replace(
        config,
        model=replace(
            model,
            vocab_size=8 * parallel.tensor,
            num_layers=max(stages - 1, 1) + suffix,
            num_suffix_layers=suffix,
            hidden_size=2 * heads,
            num_heads=heads,
            num_kv_heads=None,
            ffn_hidden_size=heads,
            prime_ffn_hidden_size=None,
            window_size=window,
            # Others send nothing between the parts of a sequence.
            mixers=model.mixers if known else "attention",
        ),
        inner=replace(inner, chunk_size=chunk, two_level=False, segment_chunks=None),
        data=replace(config.data, sequence_length=part * parts),
        training=replace(
            config.training,
            precision="fp32",
            micro_batch_size=1,
            global_batch_size=number * parallel.data,
            cuda_graphs=False,
        ),
        fp8=type(config.fp8)(),
    )


class _Unreduced(nn.Module):
    """A replica as megatron-core's DDP holds it: the same calls, and no gradients reduced."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self.module = replica
        self.ddp_config = DistributedDataParallelConfig()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def _record(config: RunConfig, groups: Groups) -> Record:
    learners = [learner.to(groups.device) for learner in build_learners(config, groups)]
    chunks = _unreduced(learners, config)
    length = config.data.sequence_length
    rows = config.training.global_batch_size // groups.data_size
    tokens = torch.zeros(1, length, dtype=torch.int64, device=groups.device)
    one = Batch(
        tokens=tokens,
        targets=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        rows=tokens[:, 0],
        documents=tokens[:, :2],
    )
    with recording() as record:
        forward_backward(chunks, [one] * rows, config.inner.lr, groups)
        groups.settle()
    return record


def _unreduced(learners: Sequence[Learner], config: RunConfig) -> list[_Unreduced]:
    """As `replicate` wraps learners."""
    made = transformer_config(config.model, config.parallel, learners[0].compute_dtype)
    several = len(learners) > 1
    chunks = [
        _Unreduced(Replica(made, learner, number if several else None))
        for number, learner in enumerate(learners)
    ]
    made.finalize_model_grads_func = lambda *args, **kwargs: None
    made.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
    return chunks
