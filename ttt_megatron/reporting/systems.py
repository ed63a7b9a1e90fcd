"""Costs of every system by context length, and their crossings, from results of `bench`."""

from collections.abc import Mapping

from ttt_megatron.bench.results import Report
from ttt_megatron.bench.system_cases import SECTION
from ttt_megatron.bench.system_plot import system_panels
from ttt_megatron.bench.system_tables import system_tables
from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.section import Panel, Section


def systems_section(benches: Mapping[str, Report]) -> Section | None:
    """Tables as `bench` has them, and a plot of every cost; None if no systems were measured."""
    grids: list[Grid] = []
    panels: list[Panel] = []
    notes: list[str] = []
    for label, report in benches.items():
        rows = [one for one in report.results if one.section == SECTION]
        if not rows:
            continue
        place = f"{label}: {report.about.get('device')}, {report.about.get('date')}"
        for table in system_tables(rows):
            body = [list(row) for row in table.rows]
            title = f"{place}: {table.title}"
            grids.append(Grid(title=title, header=list(table.columns), rows=body))
            notes.append(f"{table.title}: {table.note}")
        panels += system_panels(rows, f"{label}: ")
    if not grids:
        return None
    text = "\n\n".join(["As `ttt-megatron bench` measured them.", *dict.fromkeys(notes)])
    return Section(title="Every system", text=text, grids=grids, panels=panels)
