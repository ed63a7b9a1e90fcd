"""A picture of the results: kernels on the left, everything that is made of them on the right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_megatron.bench import latency_cases, meta_cases
from ttt_megatron.bench.case import OURS
from ttt_megatron.bench.models import E2E, FULL, SWA
from ttt_megatron.bench.results import Report, Result
from ttt_megatron.bench.system_plot import system_panels
from ttt_megatron.bench.tables import mean_token

_COLOURS = {E2E: "C0", f"{E2E}, save_all": "C9", SWA: "C1", FULL: "C2"}
_COLOURS[meta_cases.FULL_BY_SDPA] = "C8"
_STYLES = ("-", "--", ":", "-.")
_MOST_BARS = 60
Panel = Callable[[Any], None]


def draw(report: Report, path: Path) -> bool:
    """Writes a PNG; False if nothing was measured that can be drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels, others = _kernel_rows(report), _other_panels(report)
    if not kernels and not others:
        return False
    bars = len(kernels) + 1.6 * len({_place(one) for one in kernels})
    height = max(3.2 * len(others), 0.2 * bars + 1.2, 3.0)
    columns = bool(kernels) + bool(others)
    figure = pyplot.figure(figsize=(7.5 * columns, height), layout="constrained")
    halves = figure.subfigures(1, columns, squeeze=False)[0]
    if kernels:
        _bars_of_floor(halves[0].subplots(), kernels, report.results)
    if others:
        axes = halves[-1].subplots(len(others), 1, squeeze=False).flat
        for axis, panel in zip(axes, others, strict=True):
            panel(axis)
    figure.suptitle(f"{report.about['device']}, {report.about['date']}", fontsize=9)
    beside = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(beside, dpi=100)
    pyplot.close(figure)
    beside.replace(path)
    return True


def _kernel_rows(report: Report) -> list[Result]:
    found = [
        r
        for r in report.results
        if r.section == "kernels" and r.way == OURS and r.share_of_floor is not None
    ]
    return found[:_MOST_BARS]


def _other_panels(report: Report) -> list[Panel]:
    rows = {
        section: [r for r in report.results if r.section == section and r.median]
        for section in ("inner", "meta", "latency")
    }
    found: list[Panel] = []
    if rows["inner"]:
        found.append(lambda axis: _bars_of_chunks(axis, rows["inner"]))
    if rows["meta"]:
        found.append(lambda axis: _lines_of_steps(axis, rows["meta"]))
    if rows["latency"]:
        found.append(lambda axis: _lines_of_prefill(axis, rows["latency"]))
        found.append(lambda axis: _lines_of_decoding(axis, rows["latency"]))
    return [*found, *system_panels(report.results)]


def _place(one: Result) -> str:
    return f"{one.operation}: {one.shape}, {one.precision}"


def _bars_of_floor(axis: Any, rows: list[Result], everything: list[Result]) -> None:
    """Bars of ours under a heading a shape, and a mark where a baseline is on the same pass."""
    at, heading, ticks = 0.0, "", []
    for one in rows:
        if _place(one) != heading:
            heading = _place(one)
            at += 1.6
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            at_left = {"fontsize": 7.5, "weight": "bold", "va": "center", "bbox": box}
            axis.text(0.3, at - 0.85, heading, **at_left)
        share = 100 * (one.share_of_floor or 0.0)
        axis.barh(at, share, color=_COLOURS[E2E], height=0.75)
        others = [
            100 * one.floor / other.median
            for other in everything
            if other.key[:5] == one.key[:5] and other.way != OURS and other.median and one.floor
        ]
        axis.plot(others, [at] * len(others), "|", color="black", markersize=9)
        # In a column of its own, where no mark can be taken for what it says.
        beside = axis.get_yaxis_transform()
        axis.text(1.01, at, f"{share:.0f}%", va="center", fontsize=7, transform=beside)
        ticks.append((at, one.name))
        at += 1
    axis.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axis.set_ylim(at, 0)
    axis.axvline(100, color="grey", linewidth=1, linestyle="--")
    axis.margins(x=0.1)
    axis.set(
        xlabel="floor over time, %",
        title="Kernels against the machine's limits (bars: ours, |: PyTorch's)",
    )


def _bars_of_chunks(axis: Any, rows: list[Result]) -> None:
    milliseconds = [1e3 * (one.median or 0.0) for one in rows]
    labels = [f"{one.name}\n{_size_of(one)}" for one in rows]
    axis.barh(range(len(rows)), milliseconds, color=_COLOURS[E2E])
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    for place, (value, one) in enumerate(zip(milliseconds, rows, strict=True)):
        ratio = "" if one.ratio is None else f" ({one.ratio:.2f}x)"
        axis.text(value, place, f" {value:.3g} ms{ratio}", va="center", fontsize=7)
    axis.set(xlabel="ms a chunk", title="One chunk of the suffix")


def _tokens_in(shape: str) -> int:
    """The last number of a shape's words: tokens of a sequence or a context."""
    words = [word.replace(",", "") for word in shape.split()]
    return int([word for word in words if word.isdigit()][-1])


def _size_of(one: Result) -> str:
    return f"{one.shape.split(',')[0]} {one.precision}"


Lines = dict[tuple[str, str], list[tuple[int, float]]]


def _lines(axis: Any, lines: Lines, xlabel: str, ylabel: str, title: str) -> None:
    """Lines by size and model: the model chooses the colour, the size the dashes."""
    sizes = list(dict.fromkeys(size for size, _ in lines))
    for (size, model), points in lines.items():
        points.sort()
        axis.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            linewidth=1.2,
            color=_COLOURS.get(model.removesuffix(f", {meta_cases.GRAPHS}")),
            alpha=0.6 if model.endswith(meta_cases.GRAPHS) else 1.0,
            linestyle=_STYLES[sizes.index(size) % len(_STYLES)],
            label=f"{model}, {size}",
        )
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if lines:
        axis.legend(fontsize=7)


def _lines_of_steps(axis: Any, rows: list[Result]) -> None:
    lines: Lines = {}
    for one in rows:
        is_step = one.operation == meta_cases.OPERATION
        if is_step and one.ratio is not None and one.name != meta_cases.PLAIN:
            point = _tokens_in(one.shape), one.ratio
            lines.setdefault((_size_of(one), one.name), []).append(point)
    _lines(axis, lines, "tokens a sequence", "time / plain", "A step over a plain one")
    axis.axhline(1, color="grey", linewidth=1, linestyle="--")


def _lines_of_prefill(axis: Any, rows: list[Result]) -> None:
    lines: Lines = {}
    for one in rows:
        if one.name == latency_cases.PREFILL and one.median and one.tokens:
            point = _tokens_in(one.shape), one.tokens / one.median
            lines.setdefault((_size_of(one), one.way), []).append(point)
    _lines(axis, lines, "tokens read", "tokens a second", "Reading a prompt")


def _lines_of_decoding(axis: Any, rows: list[Result]) -> None:
    steps = {(r.shape, r.precision, r.way): r for r in rows if r.name == latency_cases.STEP}
    lines: Lines = {}
    for one in rows:
        if one.name == latency_cases.DECODE:
            mean = mean_token(one, steps.get((one.shape, one.precision, one.way)))
            point = _tokens_in(one.shape), 1e3 * (mean or 0.0)
            lines.setdefault((_size_of(one), one.way), []).append(point)
    _lines(axis, lines, "tokens before", "ms a token", "Decoding, inner steps included")
