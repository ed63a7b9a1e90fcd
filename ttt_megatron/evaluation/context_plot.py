"""Loss by context length as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttt_megatron.evaluation.context_length import ContextCurves
from ttt_megatron.evaluation.pictures import new_figure, save_figure
from ttt_megatron.evaluation.statistics import Mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_by_context(
    curves: ContextCurves, path: Path, title: str, window_size: int | None = None
) -> None:
    """Writes a PNG: losses on the left, differences to the reference on the right, both ± 1
    standard error and over contexts on a log axis. A dashed line marks the attention window.
    """
    panels = 2 if curves.others else 1
    figure, axes = new_figure(1, panels, width=6 * panels, height=4.5)
    columns = range(len(curves.contexts))
    colours = {name: f"C{number}" for number, name in enumerate(curves.curves)}
    for name in curves.curves:
        means = [curves.mean(name, column) for column in columns]
        _draw(axes[0][0], curves.contexts, means, name, colours[name])
    for name in curves.others:
        gaps = [curves.difference(name, column) for column in columns]
        label = f"{name} - {curves.reference}"
        _draw(axes[0][1], curves.contexts, gaps, label, colours[name])
    for number, axis in enumerate(axes[0]):
        if window_size is not None and window_size <= curves.contexts[-1]:
            axis.axvline(window_size, color="grey", linestyle="--", linewidth=1, label="window")
        if number:
            axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ylabel = "difference, nats a token" if number else "nats a token"
        axis.set(xlabel="context (tokens)", ylabel=ylabel)
        axis.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def _draw(axis: "Axes", contexts: list[int], means: list[Mean], label: str, colour: str) -> None:
    y = np.array([mean.mean for mean in means])
    error = np.nan_to_num(np.array([mean.standard_error for mean in means]))
    axis.plot(contexts, y, label=label, color=colour, marker="o", markersize=3, linewidth=1.2)
    axis.fill_between(contexts, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
