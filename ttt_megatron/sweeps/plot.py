"""A sweep as a picture: the loss against each axis."""

import math
import os
from pathlib import Path
from typing import Any

from ttt_megatron.sweeps.points import short_key, show_value
from ttt_megatron.sweeps.results import SweepResults
from ttt_megatron.sweeps.spec import Axis

# From this ratio of the largest to the smallest value on, an axis is logarithmic.
_LOG_RATIO = 4


def draw_sweep(results: SweepResults, path: Path) -> bool:
    """Writes a PNG, one panel an axis; False if there is nothing to draw yet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not any(results.mean(group, results.loss).seeds for group in results.groups):
        return False
    panels = max(1, len(results.axes))
    figure, grid = pyplot.subplots(
        1, panels, figsize=(1.2 + 5 * panels, 4.2), layout="constrained", squeeze=False
    )
    for number, panel in enumerate(grid[0]):
        draw_panel(results, number, panel)
    figure.suptitle(results.name)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)
    return True


def draw_panel(results: SweepResults, number: int, panel: Any) -> None:
    """Draws the axis of this number on Matplotlib's axes; the points by name if there is none."""
    if results.axes:
        _lines(panel, results, results.axes[number])
    else:
        _marks(panel, results)


def _lines(panel: Any, results: SweepResults, axis: Axis) -> None:
    """A line for every choice of the other axes; named points go across as dashed lines."""
    places = [place[0] for place in axis.values]
    numbers = _numbers(places)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for group, points in results.groups.items():
        mean, settings = results.mean(group, results.loss), points[0].settings
        if points[0].named or not mean.seeds:
            continue
        place = axis.values.index(tuple(settings[key] for key in axis.keys))
        others = [k for one in results.axes if one is not axis for k in one.keys[:1]]
        label = ", ".join(f"{short_key(k)}={show_value(settings[k])}" for k in others)
        x = numbers[place] if numbers else float(place)
        error = 0.0 if math.isnan(mean.standard_error) else mean.standard_error
        lines.setdefault(label, []).append((x, mean.mean, error))
    for label, found in lines.items():
        places_x, means, errors = zip(*sorted(found), strict=True)
        # Between words there is nothing to go through.
        joined = "-" if numbers else "none"
        style = {"marker": "o", "markersize": 4, "capsize": 3, "linestyle": joined}
        panel.errorbar(places_x, means, yerr=errors, label=label or None, **style)
    named = [group for group, points in results.groups.items() if points[0].named]
    for number, group in enumerate(named):
        mean = results.mean(group, results.loss)
        if mean.seeds:
            colour = f"C{len(lines) + number}"
            panel.axhline(mean.mean, linestyle="--", linewidth=1.2, color=colour, label=group)
    if numbers and min(numbers) > 0 and max(numbers) / min(numbers) >= _LOG_RATIO:
        panel.set_xscale("log", base=2)
    ticks = numbers or list(map(float, range(len(places))))
    panel.set_xticks(ticks, [show_value(place) for place in places])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    # All keys of an axis, but the first alone gives its ticks.
    panel.set(xlabel=" and ".join(axis.keys), ylabel=f"{results.loss}, nats a token")
    if panel.get_legend_handles_labels()[1]:
        panel.legend(fontsize=8)


def _numbers(places: list[Any]) -> list[float]:
    """The places as numbers; empty if some are none, or stand twice."""
    if any(isinstance(place, bool) or not isinstance(place, int | float) for place in places):
        return []
    return [float(place) for place in places] if len(set(places)) == len(places) else []


def _marks(panel: Any, results: SweepResults) -> None:
    """Points by name where there is no axis."""
    for place, group in enumerate(results.groups):
        mean = results.mean(group, results.loss)
        if mean.seeds:
            error = 0.0 if math.isnan(mean.standard_error) else mean.standard_error
            panel.errorbar([mean.mean], [place], xerr=[error], marker="o", capsize=3, color="C0")
    panel.set_yticks(range(len(results.groups)), list(results.groups))
    panel.invert_yaxis()
    panel.grid(alpha=0.3)
    panel.set(xlabel=f"{results.loss}, nats a token")
