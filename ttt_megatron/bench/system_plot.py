"""Costs of systems over the context length, a line a system."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ttt_megatron.baselines.systems import SYSTEMS
from ttt_megatron.bench.results import Result
from ttt_megatron.bench.system_cases import REFERENCE, REPEATS
from ttt_megatron.bench.system_figures import (
    DECODE_COST,
    EXECUTED_FLOPS,
    MODEL_FLOPS,
    READ_COST,
    TRAIN_COST,
    costs_by_model,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = {
    READ_COST: "ms",
    DECODE_COST: "ms",
    TRAIN_COST: "ms",
    MODEL_FLOPS: "MFLOPs",
    EXECUTED_FLOPS: "MFLOPs",
}
_SCALES = {"ms": 1e3, "MFLOPs": 1e-6}
_MARKERS = "osv^D<>PX*h"


def system_panels(rows: Sequence[Result], label: str = "") -> list[Callable[["Axes"], None]]:
    """A panel for every cost of every model that was measured; `label` goes before their titles."""
    return [
        partial(_draw, f"{label}{size}, {precision}: {cost}", unit, lines)
        for (size, precision), costs in costs_by_model(rows).items()
        for cost, unit in _UNITS.items()
        if (lines := costs[cost])
    ]


def _draw(title: str, unit: str, lines: dict[str, dict[int, float]], axis: "Axes") -> None:
    from matplotlib.ticker import LogLocator

    order = [system.label for name, system in SYSTEMS.items() if name not in REPEATS]
    for system, points in lines.items():
        lengths = sorted(points)
        # A system has its colour in every panel, whatever others were measured.
        place = order.index(system) if system in order else len(order)
        axis.plot(
            lengths,
            [points[n] * _SCALES[unit] for n in lengths],
            marker=_MARKERS[place % len(_MARKERS)],
            color=f"C{place % 10}",
            markersize=4,
            linewidth=2.4 if system == REFERENCE else 1.0,
            label=system,
        )
    ticks = sorted({n for points in lines.values() for n in points})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set(xlabel="context, tokens", ylabel=unit, title=title)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
