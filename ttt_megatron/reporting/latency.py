"""Prefill and decoding times by context length, from results of `ttt-megatron bench`."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ttt_megatron.bench import latency_cases
from ttt_megatron.bench.results import Report, Result
from ttt_megatron.bench.tables import tables_of
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.section import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SECTION = "latency"


def latency_section(benches: Mapping[str, Report]) -> Section | None:
    """Tables as `bench` has them, and a plot of reading speed; None if no latency was measured."""
    grids = []
    measured: dict[str, list[Result]] = {}
    for label, report in benches.items():
        rows = [one for one in report.results if one.section == _SECTION]
        if not rows:
            continue
        for table in tables_of(Report(about=report.about, results=rows)):
            title = f"{label}: {report.about.get('device')}, {report.about.get('date')}"
            body = [list(row) for row in table.rows]
            grids.append(Grid(title=title, header=list(table.columns), rows=body))
        measured[label] = rows
    if not grids:
        return None
    return Section(
        title="Latency",
        text="As `ttt-megatron bench` measured it.",
        grids=grids,
        panels=[partial(_draw, measured)] if _lines(measured) else [],
    )


def _lines(measured: Mapping[str, list[Result]]) -> dict[str, list[tuple[int, float]]]:
    """Tokens a second over the prompt's length, by benchmark and model."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for label, rows in measured.items():
        for one in rows:
            if one.name == latency_cases.PREFILL and one.median and one.tokens:
                name = f"{label}: {one.way}, {one.precision}"
                lines.setdefault(name, []).append((one.tokens, one.tokens / one.median))
    return lines


def _draw(measured: Mapping[str, list[Result]], axis: "Axes") -> None:
    for name, points in _lines(measured).items():
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, marker="o", markersize=4, linewidth=1.2, label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set(xlabel="tokens read", ylabel="tokens a second", title="reading a prompt")
    axis.legend(fontsize=7)
