"""Losses of several groups over positions or context lengths, as pictures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttt_megatron.evaluation.statistics import BucketSums, Mean
from ttt_megatron.reporting.seeds import SeedCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 10


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one task's JSON is read and shown: its columns' names and places on a log axis."""

    task: str
    title: str
    column: str
    labels: Callable[[dict[str, Any]], list[str]]
    places: Callable[[dict[str, Any]], list[float]]
    sums: Callable[[dict[str, Any]], dict[str, BucketSums]]
    with_all: bool


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A group's way of reading; `main` is the group's first, `alone` its only one."""

    group: str
    way: str
    main: bool
    alone: bool
    sums: SeedCurve

    @property
    def label(self) -> str:
        """As tables have it."""
        return self.group if self.alone else f"{self.group}, {self.way}"


def draw_losses(layout: Layout, values: dict[str, Any], curves: list[Curve], axis: "Axes") -> None:
    """Curves ± 1 standard error; `values` are one evaluation's, for its columns."""
    numbers = range(len(layout.labels(values)))
    means = [[c.sums.mean(n) for n in numbers] for c in curves]
    _draw(axis, layout, values, curves, means, _colours(curves))
    axis.set(ylabel="nats a token", title=layout.title.lower())


def draw_gaps(
    layout: Layout, values: dict[str, Any], curves: list[Curve], chosen: Curve, axis: "Axes"
) -> None:
    """All other curves' differences to the chosen one ± 1 standard error."""
    numbers = range(len(layout.labels(values)))
    others = [c for c in curves if c is not chosen]
    means = [[c.sums.difference(chosen.sums, n) for n in numbers] for c in others]
    axis.axhline(0, color="black", linewidth=0.8)
    _draw(axis, layout, values, others, means, _colours(curves))
    axis.set(ylabel="difference, nats a token", title=f"difference to {chosen.label}")


def _draw(
    axis: "Axes",
    layout: Layout,
    values: dict[str, Any],
    curves: list[Curve],
    means: list[list[Mean]],
    colours: dict[str, Any],
) -> None:
    """A colour for every group, dashes for its other ways of reading."""
    x = layout.places(values)
    for curve, row in zip(curves, means, strict=True):
        y = np.array([mean.mean for mean in row])
        error = np.nan_to_num(np.array([mean.standard_error for mean in row]))
        colour = colours[curve.group]
        line = "-" if curve.main else ":" if curve.way == "off" else "--"
        axis.plot(x, y, label=curve.label, color=colour, linestyle=line, marker="o", markersize=3)
        axis.fill_between(x, y - error, y + error, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set(xlabel=f"{layout.column} (tokens)")
    axis.grid(alpha=0.3)
    _legend(axis, np.array([row[-1].mean for row in means]))


def _colours(curves: list[Curve]) -> dict[str, Any]:
    """Each group's own, the same in every picture; from the eleventh on lighter."""
    from matplotlib import colormaps

    groups = dict.fromkeys(curve.group for curve in curves)
    paired = colormaps["tab20"].colors  # type: ignore[attr-defined]
    shades = [*paired[::2], *paired[1::2]]
    return {group: shades[number % len(shades)] for number, group in enumerate(groups)}


def _legend(axis: "Axes", last: np.ndarray) -> None:
    """Names in the order of the lines' right ends; of many lines, beside the axes."""
    lines, labels = axis.get_legend_handles_labels()
    order = np.argsort(-last)
    shown = [lines[n] for n in order], [labels[n] for n in order]
    if len(labels) <= _FEW:
        axis.legend(*shown, fontsize=7)
    else:
        axis.legend(*shown, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
