"""What a whole outer step sends, counted in every process: docs/parallelism.md, "What is sent"."""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from parallel_course import Kind, build, outer_step, traffic

from ttt_megatron.config import ParallelConfig
from ttt_megatron.parallel.groups import Groups, layout
from ttt_megatron.parallel.replica import replicate
from ttt_megatron.parallel.traffic import counted_traffic
from ttt_megatron.training.optimizer import build_optimizer

TENSOR = ParallelConfig(tensor=2)
SEQUENCE = replace(TENSOR, sequence_parallel=True)
PIPELINE = ParallelConfig(pipeline=2)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
UNTIED = {"tie_embeddings": False}
EMBEDDING = "model.embedding.weight"
FOUR = {"micro": 1, "sequences": 4}

TWO = [
    Kind(parallel=TENSOR, micro=2, sequences=4),
    Kind(parallel=SEQUENCE, micro=2, sequences=4),
    Kind(parallel=ParallelConfig(data=2), **FOUR),
    Kind(parallel=PIPELINE, **FOUR),
    Kind(parallel=replace(PIPELINE, virtual_pipeline=2), model={"num_layers": 6}, **FOUR),
    Kind(parallel=ParallelConfig(context=2), length=16, **FOUR),
]
FOUR_RANKS = [
    Kind(parallel=replace(PIPELINE, data=2), **FOUR),
    Kind(parallel=replace(PIPELINE, data=2), model=UNTIED, micro=2, sequences=4),
    Kind(parallel=ParallelConfig(data=4, **OVERLAP), **FOUR),
    Kind(parallel=ParallelConfig(context=2, data=2), length=16, **FOUR),
    Kind(parallel=replace(PIPELINE, context=2), length=16, **FOUR),
    Kind(parallel=replace(SEQUENCE, data=2), micro=2, sequences=4),
    Kind(parallel=replace(SEQUENCE, pipeline=2), **FOUR),
]


@dataclass
class Counted:
    """What one process sent and held.

    Elements by kind of collective, in a step and in a micro-batch's passes; its context and
    pipeline rank; and the sizes of its parameters by stage and name.
    """

    step: Counter[str]
    micro_batch: Counter[str]
    place: tuple[int, int]
    stages: list[dict[str, int]]


def _count(groups: Groups, kind: Kind) -> Counted:
    """A step's traffic, and that of a micro-batch within a tensor-parallel group."""
    learners = build(kind, groups)
    chunks = replicate(learners, kind.config.model, kind.parallel)
    optimizer = build_optimizer(chunks, kind.config.optimizer, total_steps=20)
    if kind.parallel.overlap_param_gather:
        # Only after an update are there parameters to gather during the passes.
        outer_step(groups, kind, chunks, optimizer, 0)
    with counted_traffic() as step:
        outer_step(groups, kind, chunks, optimizer, 1)
    inside: Counter[str] = Counter()
    if kind.parallel.tensor > 1 and kind.parallel.pipeline == 1:
        forward, backward = traffic(replace(kind, sequences=kind.micro))
        inside = forward.elements + backward.elements
    stages = [{name: p.numel() for name, p in one.named_parameters()} for one in learners]
    return Counted(step.elements, inside, (groups.context_rank, groups.pipeline_rank), stages)


def count(device: torch.device, kinds: list[Kind]) -> list[list[Counted]]:
    """What every process sends in a step of each kind. Collective."""
    found = []
    for kind in kinds:
        with layout(device, kind.parallel) as groups:
            found.append(groups.gather_objects(_count(groups, kind)))
    return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _between_stages(kind: Kind, counted: Counted) -> int:
    """Elements sent of the hidden stream, and of its cotangent."""
    parallel, turns = kind.parallel, len(counted.stages)
    last = turns * parallel.pipeline - 1
    own = range(counted.place[1], last + 1, parallel.pipeline)
    boundaries = sum((stage < last) + (stage > 0) for stage in own)
    stream = kind.micro * kind.length // parallel.context * kind.config.model.hidden_size
    return boundaries * stream // (parallel.tensor if parallel.sequence_parallel else 1)


def _between_parts(kind: Kind, counted: Counted) -> int:
    """docs/context-parallelism.md, "Bytes": elements sent to other parts, in both directions."""
    model, (rank, stage) = kind.config.model, counted.place
    size, suffix = kind.parallel.context, model.num_suffix_layers
    part, width, reach = kind.length // size, model.hidden_size, model.window_size - 1
    before, after = rank * part, (size - 1 - rank) * part
    # The first suffix block's attention runs over all tokens, the others' as the inner loop does.
    has_suffix = stage == kind.parallel.pipeline - 1
    layers = {n.split(".")[2] for one in counted.stages for n in one if ".layers." in n}
    prefix = len(layers) - (suffix - 1 if has_suffix else 0)
    sent = 2 * prefix * width * (min(reach, before) + min(reach, after))
    if has_suffix:
        fast = sum(n for one in counted.stages for name, n in one.items() if ".prime_mlp." in name)
        entry = 2 * (suffix - 1) * width
        sent += (rank < size - 1) * (fast + entry * min(reach, before + part))
        sent += (rank > 0) * (fast + entry * min(reach, before))
    return kind.micro * sent


def _buckets(held: dict[str, int], apart: str | None) -> int:
    """Elements of the buffers that are reduced and gathered among copies, padding included.

    A parameter that two stages share, `apart`, has a bucket of its own.
    """
    buckets = [[n for name, n in held.items() if name != apart], [held.get(apart or "", 0)]]
    return sum(_up(sum(_up(size, 64) for size in bucket), 128) for bucket in buckets)


def _expected(kind: Kind, counted: Counted) -> Counter[str]:
    """Elements a process sends in a step, by kind."""
    parallel, model = kind.parallel, kind.config.model
    micro_batches = kind.sequences // (kind.micro * parallel.data)
    found = Counter({name: n * micro_batches for name, n in counted.micro_batch.items()})
    # The log and the gradient norm, over all processes.
    found["allreduce"] += 2 * 6 + 2 + 1
    held = {name: size for stage in counted.stages for name, size in stage.items()}
    layers, suffix, width = model.num_layers, model.num_suffix_layers, model.hidden_size
    if parallel.tensor > 1:
        found["allreduce"] += 2 * layers * width // model.num_heads
    if parallel.sequence_parallel:
        found["allreduce"] += (4 * layers + 2 * suffix + 1) * width
    shared = EMBEDDING if parallel.pipeline > 1 and model.tie_embeddings else None
    if shared is not None:
        found["allreduce"] += held.get(shared, 0)
    if parallel.data * parallel.context > 1:
        buckets = sum(_buckets(stage, shared) for stage in counted.stages)
        found["reduce_scatter"] += buckets
        found["allgather"] += buckets
    if parallel.pipeline > 1:
        found["send"] += micro_batches * _between_stages(kind, counted)
    if parallel.context > 1:
        found["send"] += micro_batches * _between_parts(kind, counted)
    return +found


def hold_to_formulas(kind: Kind, ranks: list[Counted]) -> None:
    """Asserts that every process sent what the formulas say, and that it was received."""
    for rank, counted in enumerate(ranks):
        sent = {n: e for n, e in counted.step.items() if not n.startswith("recv")}
        expected = dict(_expected(kind, counted))
        if kind.parallel.tensor > 1 and kind.parallel.pipeline > 1:
            # What a stage sends within tensor-parallel groups has no formula of its own.
            sent, expected = {"send": sent["send"]}, {"send": expected["send"]}
        assert sent == expected, (kind, rank)
    received = sum(n for one in ranks for k, n in one.step.items() if k.startswith("recv"))
    assert received == sum(one.step["send"] for one in ranks), kind
