"""A plan as tables of text and as a JSON value."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from ttt_megatron.planning.estimate import Estimate
from ttt_megatron.planning.hardware import GIB
from ttt_megatron.planning.memory import KINDS
from ttt_megatron.planning.search import Plan
from ttt_megatron.planning.units import compute_precision, in_float8

Rows = list[list[str]]
SECONDS_A_DAY = 86400


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A title, and rows of which the first is the heading; the first column is a label."""

    title: str
    rows: Rows

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = []
        for number, row in enumerate(self.rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
            if number == 0:
                lines.append("─" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join([self.title, *lines])


def tables(plan: Plan) -> list[TextTable]:
    """Layouts; memory by kind; FLOPs, transfers and time; bubbles. One column a layout."""
    named = list(_named(plan))
    return [_layouts(plan, named), _memory(plan, named), _step(named), _bubbles(named)]


def heading(plan: Plan) -> str:
    """What is planned, on what, and the efficiencies assumed."""
    config, gpu = plan.config, plan.hardware
    training, precision = config.training, config.training.precision
    rates = f"{gpu.flops(compute_precision(config)) / 1e12:g} TFLOP/s"
    if in_float8(config):
        rates += f" ({gpu.fp8_tflops:g} in float8)"
    return (
        f"{config.name}: {training.global_batch_size} sequences of "
        f"{config.data.sequence_length:,} tokens a step, {training.steps:,} steps, {precision}\n"
        f"{plan.gpus} x {gpu.name}: {gpu.memory_gib:g} GiB, of which "
        f"{gpu.memory_bytes / GIB:.1f} usable; {rates}, "
        f"{gpu.memory_gbs:g} GB/s memory, {gpu.nvlink_gbs:g} GB/s in a node of "
        f"{gpu.gpus_per_node}, {gpu.network_gbs:g} GB/s between\n"
        f"assumed to be reached: {gpu.matmul_efficiency:.0%} of peak in matrix products, "
        f"{gpu.attention_efficiency:.0%} in attention, {gpu.memory_efficiency:.0%} of memory and "
        f"{gpu.link_efficiency:.0%} of link bandwidth"
    )


def overrides(plan: Plan) -> list[str]:
    """The settings of every layout, numbered as in the tables."""
    return [f"{name}: {' '.join(found.layout.overrides())}" for name, found in _named(plan)]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, bytes and seconds unrounded."""
    return {
        "run": plan.config.name,
        "gpus": plan.gpus,
        "hardware": dataclasses.asdict(plan.hardware),
        "note": plan.note,
        "recipe": None if plan.recipe is None else _estimate_json(plan, plan.recipe),
        "best": [_estimate_json(plan, found) for found in plan.best],
    }


def _named(plan: Plan) -> Iterator[tuple[str, Estimate]]:
    if plan.recipe is not None:
        yield "recipe", plan.recipe
    for number, found in enumerate(plan.best, 1):
        yield str(number), found


def _estimate_json(plan: Plan, found: Estimate) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(found.layout),
        "overrides": found.layout.overrides(),
        "prefix_blocks": found.prefix_blocks,
        "schedule": found.schedule,
        "schedules": {k: dataclasses.asdict(v) for k, v in found.schedules.items()},
        "fits": found.fits,
        "memory_bytes": found.chosen.memory,
        "flops_per_gpu": found.flops,
        "flops_per_step": found.step_flops,
        "sent_bytes": found.transfers,
        "seconds": found.parts,
        "step_seconds": found.step_seconds,
        "tokens_per_second": found.tokens_per_second,
        "days": _days(plan, found),
    }


def _short(value: float) -> str:
    """Two decimals, or two digits of what is below one."""
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _days(plan: Plan, found: Estimate) -> float:
    return found.step_seconds * plan.config.training.steps / SECONDS_A_DAY


def _layouts(plan: Plan, named: list[tuple[str, Estimate]]) -> TextTable:
    rows = [["", "layout", "keeps", "schedule", "GiB", "bubble", "step s", "tokens/s", "days"]]
    for name, found in named:
        memory = found.chosen.memory_bytes / GIB
        rows.append(
            [
                name,
                str(found.layout),
                found.layout.choices,
                found.schedule,
                f"{_short(memory)}{'' if found.fits else ' !'}",
                f"{found.chosen.bubble:.2f}",
                f"{found.step_seconds:.3g}",
                f"{found.tokens_per_second:,.0f}",
                f"{_days(plan, found):.2g}",
            ]
        )
    note = "" if all(found.fits for _, found in named) else "; ! does not fit"
    return TextTable(f"layouts (memory a GPU{note})", rows)


def _memory(plan: Plan, named: list[tuple[str, Estimate]]) -> TextTable:
    rows = [["", *(name for name, _ in named)]]
    for kind in KINDS:
        values = [found.chosen.memory[kind] / GIB for _, found in named]
        if any(values):
            rows.append([kind, *map(_short, values)])
    rows.append(["total", *(_short(found.chosen.memory_bytes / GIB) for _, found in named)])
    usable = plan.hardware.memory_bytes / GIB
    return TextTable(f"memory of the fullest GPU, GiB of {usable:.1f}", rows)


def _step(named: list[tuple[str, Estimate]]) -> TextTable:
    rows = [["", *(name for name, _ in named)]]
    rows.append(["TFLOP", *(_short(found.flops / 1e12) for _, found in named)])
    for kind in named[0][1].transfers:
        values = [found.transfers[kind] / 1e9 for _, found in named]
        if any(values):
            rows.append([f"GB sent, {kind}", *map(_short, values)])
    for part in named[0][1].parts:
        rows.append([f"s, {part}", *(f"{found.parts[part]:.3g}" for _, found in named)])
    return TextTable("a step of the busiest GPU", rows)


def _bubbles(named: list[tuple[str, Estimate]]) -> TextTable:
    schedules = list(dict.fromkeys(s for _, found in named for s in found.schedules))
    rows = [["", *(name for name, _ in named)]]
    for schedule in schedules:
        cells = []
        for _, found in named:
            result = found.schedules.get(schedule)
            unfit = result is not None and not result.fits
            cells.append("-" if result is None else f"{result.bubble:.2f}{' !' if unfit else ''}")
        rows.append([schedule, *cells])
    return TextTable("share of the time spent waiting, by schedule (! does not fit)", rows)
