"""Loss by position as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_megatron.evaluation.pictures import new_figure, save_figure
from ttt_megatron.evaluation.report import PositionReport
from ttt_megatron.evaluation.statistics import Bucket


def draw_by_position(
    report: PositionReport,
    path: Path,
    title: str,
    window_size: int | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a PNG: one curve a way of reading, ± 1 standard error, positions on a log axis.

    The attention window is marked by a dashed line where positions go beyond it. `styles` are
    Matplotlib's settings of a line, by curve.
    """
    figure, ((axes,),) = new_figure(1, 1, width=8, height=4.5)
    x = _centres(report.buckets)
    for name in report.curves:
        means = [report.mean(name, number) for number in range(len(report.buckets))]
        y = np.array([mean.mean for mean in means])
        error = np.nan_to_num(np.array([mean.standard_error for mean in means]))
        style = {"marker": "o", "markersize": 3, "linewidth": 1.2, **(styles or {}).get(name, {})}
        (line,) = axes.plot(x, y, label=name, **style)
        axes.fill_between(x, y - error, y + error, color=line.get_color(), alpha=0.2, linewidth=0)
    if window_size is not None and window_size < report.buckets[-1].stop:
        axes.axvline(window_size, color="grey", linestyle="--", linewidth=1, label="window")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(xlabel="position (tokens)", ylabel="nats a token", title=title)
    axes.legend()
    save_figure(figure, path)


def _centres(buckets: Sequence[Bucket]) -> np.ndarray:
    """Where a bucket is drawn: the middle on the log axis, the first one's on the linear one."""
    return np.array([np.sqrt(max(b.start, b.stop / 4) * b.stop) for b in buckets])
