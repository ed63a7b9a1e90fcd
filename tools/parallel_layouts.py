"""The tiny model as large as a layout needs it, and the layouts that are held to one process."""

import math
from dataclasses import replace

from parallel_course import INNER, MODEL, Kind

from ttt_megatron.config import ParallelConfig
from ttt_megatron.config.schema import ContextOrder

SCHEDULES = ("1f1b", "zigzag", "interleaved")


def layout(
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    data: int = 1,
    *,
    schedule: str = "1f1b",
    sequence_parallel: bool = False,
    overlap: bool = False,
) -> ParallelConfig:
    """A recipe's parallel section; of the schedules zigzag is of contexts, interleaved of stages.

    Nothing is refused here.
    """
    order: ContextOrder = "zigzag" if schedule == "zigzag" else "1f1b"
    return ParallelConfig(
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        data=data,
        context_order=order,
        virtual_pipeline=2 if schedule == "interleaved" else 1,
        sequence_parallel=sequence_parallel,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )


def grown(
    parallel: ParallelConfig, micro_batches: int | None = None, window: int | None = None
) -> Kind:
    """The tiny model with heads, prefix blocks, chunks and sequences enough for a layout.

    Beyond four chunks the inner learning rate falls with their number: rounding errors of the
    first step's outer gradients grow a thousandfold through the two that follow where it does not.

    `micro_batches` of one sequence a replica and step; None is as many as there are contexts or
    pipeline stages, at least two. `window` None is the model's own, shorter than a part.
    """
    # Sizes that are no sizes are left for the recipe's validation.
    tensor, context, pipeline, data = (
        max(1, size)
        for size in (parallel.tensor, parallel.context, parallel.pipeline, parallel.data)
    )
    turns = parallel.virtual_pipeline
    if micro_batches is None:
        micro_batches = max(2, context, pipeline)
        if turns > 1:
            micro_batches = _multiple_of(pipeline, micro_batches)
    heads = math.lcm(MODEL["num_heads"], tensor)
    suffix = MODEL["num_suffix_layers"]
    chunk = INNER["chunk_size"]
    if parallel.sequence_parallel:
        chunk = math.lcm(chunk, tensor)
    model = {
        "vocab_size": _multiple_of(tensor, MODEL["vocab_size"]),
        "num_layers": max(MODEL["num_layers"], suffix + turns * pipeline - 1),
        "num_heads": heads,
        "hidden_size": heads * MODEL["hidden_size"] // MODEL["num_heads"],
        "ffn_hidden_size": heads * MODEL["ffn_hidden_size"] // MODEL["num_heads"],
        "window_size": window or max(MODEL["window_size"], chunk),
    }
    chunks = 3 if context == 1 else 2 * context
    if context > 4 and parallel.context_order != "zigzag":
        chunks = context
    return Kind(
        parallel=parallel,
        model=model,
        inner={"chunk_size": chunk, "lr": INNER["lr"] * min(1.0, 4 / chunks)},
        micro=1,
        length=chunks * chunk,
        sequences=micro_batches * data,
    )


def _multiple_of(size: int, least: int) -> int:
    return -(-least // size) * size


def all_layouts() -> dict[str, Kind]:
    """Every layout that is held to one process, by name; one process itself in micro-batches."""
    layouts = {
        "1 process": layout(),
        "TP2": layout(2),
        "TP2+SP": layout(2, sequence_parallel=True),
        "CP2": layout(context=2),
        "CP2 zigzag": layout(context=2, schedule="zigzag"),
        "PP2": layout(pipeline=2),
        "PP2 interleaved": layout(pipeline=2, schedule="interleaved"),
        "DP2": layout(data=2),
        "DP2 overlap": layout(data=2, overlap=True),
        "CP4": layout(context=4),
        "CP4 zigzag": layout(context=4, schedule="zigzag"),
        "TP2xCP2": layout(2, 2),
        "TP2xPP2": layout(2, pipeline=2),
        "CP2xPP2": layout(context=2, pipeline=2),
        "CP2xDP2": layout(context=2, data=2),
        "PP2xDP2": layout(pipeline=2, data=2),
        "TP2xCP2xDP2": layout(2, 2, data=2),
        "TP2xCP2xPP2": layout(2, 2, pipeline=2),
    }
    cases = {name: grown(parallel) for name, parallel in layouts.items()}
    cases["1 process, 8 chunks"] = replace(cases["CP4"], parallel=layout())
    # Parts of 8 tokens: a window into the part before, and into all parts before.
    cases["CP2, window > part"] = grown(layouts["CP2"], window=14)
    cases["CP4, window > 2 parts"] = grown(layouts["CP4"], window=20)
    return dict(sorted(cases.items(), key=lambda item: item[1].parallel.world_size))
