"""A simulation as text: layout, groups, what ranks hold and read, what was and was not checked."""

from collections.abc import Iterator

from ttt_megatron.planning.hardware import GIB
from ttt_megatron.planning.layout import recipe_layout
from ttt_megatron.planning.report import TextTable
from ttt_megatron.simulation.model_parts import ModelPart
from ttt_megatron.simulation.simulate import Simulation

_SHOWN_RANKS = 8


def report(found: Simulation) -> str:
    """Everything, in a few tables."""
    return "\n\n".join(
        [
            "\n".join(_heading(found)),
            str(_groups(found)),
            str(_ranks(found)),
            "\n".join(_end(found)),
        ]
    )


def _heading(found: Simulation) -> Iterator[str]:
    config, data = found.config, found.data
    layout = recipe_layout(config)
    settings = " ".join(found.laid_out.settings) or "(the recipe's)"
    yield f"{config.name} on {found.world.size} x {found.hardware.name}; nothing is trained"
    yield f"layout    {layout}, {layout.choices}, {layout.schedule}; by {found.laid_out.source}"
    yield f"settings  {settings}"
    batch, length = config.training.global_batch_size, config.data.sequence_length
    yield (
        f"a step    {batch} sequences of {length:,} tokens; a rank reads {data.rows} in "
        f"{data.micro_batches} micro-batches, {data.length:,} tokens of each: {data.tokens:,}"
    )
    if found.estimate is not None:
        days = found.estimate.step_seconds * config.training.steps / 86400
        yield (
            f"estimate  {found.estimate.step_seconds:.3g} s a step, "
            f"{found.estimate.tokens_per_second:,.0f} tokens/s, {days:.2g} days for "
            f"{config.training.steps:,} steps; at most "
            f"{found.estimate.chosen.memory_bytes / GIB:.1f} GiB a GPU of "
            f"{found.hardware.memory_bytes / GIB:.1f}"
        )


def _groups(found: Simulation) -> TextTable:
    rows = [["groups of ranks", "number", "of ranks", "the first"]]
    for kind, groups in found.world.groups.items():
        first = groups[0]
        shown = " ".join(map(str, first[:_SHOWN_RANKS])) + (
            " …" if len(first) > _SHOWN_RANKS else ""
        )
        rows.append([kind, str(len(groups)), str(len(first)), shown])
    return TextTable("every rank is once in a group of every kind", rows)


def _ranks(found: Simulation) -> TextTable:
    """A row for all ranks that hold equally much."""
    heading = ["ranks", "pipeline", "tensor", "blocks", "parameters", "GiB held", "GiB optimizer"]
    rows, seen = [heading], set()
    for part in found.parts:
        same = [one for one in found.parts if one.pipeline == part.pipeline]
        tensors = [one.tensor for one in same if one.shapes == part.shapes]
        if (part.pipeline, min(tensors)) in seen:
            continue
        seen.add((part.pipeline, min(tensors)))
        held, moments = found.state_bytes(part)
        number = sum(p.pipeline == part.pipeline for p in found.world.places)
        span = "0" if len(tensors) == 1 else f"{min(tensors)} … {max(tensors)}"
        rows.append(
            [
                f"{number} ranks",
                str(part.pipeline),
                span,
                _blocks(part),
                f"{part.parameters:,}",
                f"{held / GIB:.2f}",
                f"{moments / GIB:.3f}",
            ]
        )
    return TextTable("what each rank holds: parameters and gradients, its share of moments", rows)


def _blocks(part: ModelPart) -> str:
    spans = [f"{s.first} … {s.stop - 1}" if s.stop > s.first else "none" for s in part.stages]
    return ", ".join(spans)


def _end(found: Simulation) -> Iterator[str]:
    whole = "all parts make the model's parameters, every token of a batch is read once"
    sent = f", {found.messages} messages of a step meet" if found.messages else ""
    yield f"checked      {whole}{sent}"
    for text in found.unchecked:
        yield f"not checked  {text}"
    for text in found.warnings:
        yield f"warning      {text}"
