"""The panels of a run's dashboard."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ttt_megatron.evaluation.pictures import new_figure
from ttt_megatron.training.dashboard.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More would not be seen, and would make the page large.
_POINTS = 800
_LINE, _SECOND, _THIRD, _MARK = "#1f77b4", "#2a9d4a", "#8c5fb0", "#d9480f"
_ROWS, _COLUMNS = 3, 3


def draw_dashboard(history: RunHistory) -> "Figure":
    """All panels over the step, restarts and saves as marks, and the loss by position."""
    figure, axes = new_figure(_ROWS, _COLUMNS, width=16, height=10.5)
    panels: list[Callable[[Axes, RunHistory], None]] = [
        _loss,
        _gradient,
        _by_position,
        _learning_rate,
        _inner_rate,
        _inner_steps,
        _tokens,
        _flops,
        _memory,
    ]
    for place, (axis, panel) in enumerate(zip(axes.flat, panels, strict=True)):
        panel(axis, history)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if panel is not _by_position:
            _mark(axis, history, named=place == 0)
            axis.set_xlim(0, max(1, history.step) * 1.01)
            axis.set_xlabel("step", fontsize=8)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7.5, framealpha=0.85)
    return figure


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Steps, means, least and greatest values of at most so many stretches as can be seen."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    parts = np.array_split(np.arange(len(x)), min(len(x), _POINTS))
    return tuple(
        np.array([f(a[part]) for part in parts])
        for f, a in ((np.mean, x), (np.mean, y), (np.min, y), (np.max, y))
    )


def _curve(
    axis: "Axes",
    history: RunHistory,
    name: str,
    label: str = "",
    color: str = _LINE,
    scale: float = 1,
) -> bool:
    steps, values = history.series(name)
    if not steps:
        return False
    x, mean, low, high = thinned(steps, [value * scale for value in values])
    marker = "." if len(x) == 1 else ""
    axis.plot(x, mean, color=color, linewidth=1.2, label=label or None, marker=marker)
    if len(x) < len(steps):
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    return True


def _mark(axis: "Axes", history: RunHistory, *, named: bool) -> None:
    """Restarts as lines over the whole height, saves as ticks below the curves."""
    for number, step in enumerate(history.restarts):
        label = "restart" if named and number == 0 else None
        axis.axvline(step, color=_MARK, linewidth=1, linestyle="--", alpha=0.7, label=label)
    if named and history.saves:
        saves = history.saves[:: math.ceil(len(history.saves) / _POINTS)]
        axis.plot(
            saves,
            [0.012] * len(saves),
            transform=axis.get_xaxis_transform(),
            linestyle="",
            marker="^",
            markersize=4,
            color="#555555",
            label="checkpoint",
        )


def _loss(axis: "Axes", history: RunHistory) -> None:
    _curve(axis, history, "first_chunk_loss", "first chunk", _SECOND)
    _curve(axis, history, "last_chunk_loss", "last chunk", _THIRD)
    _curve(axis, history, "loss", "training")
    steps, values = history.series("validation_loss")
    if steps:
        axis.plot(steps, values, "o", color="black", markersize=3.5, label="validation")
    skipped = [row["step"] for row in history.rows if row.get("skipped")]
    if skipped:
        axis.plot(
            skipped,
            [0.97] * len(skipped),
            "x",
            color=_MARK,
            transform=axis.get_xaxis_transform(),
            label="skipped step",
        )
    axis.set_title("Loss, nats a token", fontsize=10)


def _gradient(axis: "Axes", history: RunHistory) -> None:
    if _curve(axis, history, "grad_norm", "before clipping"):
        axis.set_yscale("log")
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted(lambda value, _: f"{value:g}")
    clip = history.config.optimizer.clip_grad
    if clip:
        axis.axhline(clip, color="black", linewidth=0.8, linestyle=":", label=f"clip {clip:g}")
    axis.set_title("Gradient norm", fontsize=10)


def _learning_rate(axis: "Axes", history: RunHistory) -> None:
    _curve(axis, history, "learning_rate")
    axis.set_title("Learning rate", fontsize=10)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _inner_rate(axis: "Axes", history: RunHistory) -> None:
    if history.config.inner.mode == "off":
        _say(axis, "no inner steps")
    else:
        _curve(axis, history, "inner_learning_rate")
    axis.set_title("Inner learning rate", fontsize=10)


def _inner_steps(axis: "Axes", history: RunHistory) -> None:
    drawn = [
        _curve(axis, history, "inner_grad_norm", "gradient norm"),
        _curve(axis, history, "drift", "drift of fast weights", _SECOND),
        _curve(axis, history, "clipped_share", "share clipped", _THIRD),
    ]
    if not any(drawn):
        _say(axis, "no inner steps")
    axis.set_title("Inner steps", fontsize=10)


def _tokens(axis: "Axes", history: RunHistory) -> None:
    _curve(axis, history, "tokens_per_second")
    axis.set_ylim(bottom=0)
    axis.set_title("Tokens a second", fontsize=10)


def _flops(axis: "Axes", history: RunHistory) -> None:
    from matplotlib.ticker import EngFormatter

    if history.peak_flops is not None:
        _curve(axis, history, "model_flops_per_second", scale=100 / history.peak_flops)
        axis.set_title("MFU, % (of all GPUs' peak)", fontsize=10)
    else:
        _curve(axis, history, "model_flops_per_second")
        axis.yaxis.set_major_formatter(EngFormatter())
        axis.set_title("Model FLOP/s (peak not known)", fontsize=10)
    axis.set_ylim(bottom=0)


def _memory(axis: "Axes", history: RunHistory) -> None:
    _curve(axis, history, "memory_bytes", scale=1 / 2**30)
    axis.set_ylim(bottom=0)
    axis.set_title("Memory of the first process, GiB", fontsize=10)


def _by_position(axis: "Axes", history: RunHistory) -> None:
    report = history.evaluation
    axis.set_title("Loss by position, nats a token", fontsize=10)
    if report is None:
        _say(axis, "not evaluated")
        return
    middles = [math.sqrt(max(b.start, b.stop / 4) * b.stop) for b in report.buckets]
    for name in report.curves:
        means = [report.mean(name, number) for number in range(len(report.buckets))]
        axis.errorbar(
            middles,
            [mean.mean for mean in means],
            [mean.standard_error for mean in means],
            marker=".",
            linewidth=1.2,
            capsize=2,
            label=f"inner steps {name}" if name in ("on", "off") else name,
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    step = report.about.get("step")
    axis.set_xlabel(
        "position" if step is None else f"position (evaluated at step {step})", fontsize=8
    )


def _say(axis: "Axes", text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="#777777")
    axis.set_yticks([])
