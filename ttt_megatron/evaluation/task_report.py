"""What every evaluation but that by position reports: tables, figures to follow, all as JSON."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from ttt_megatron.evaluation.formatting import markdown_table


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table, as text."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """The results of one evaluation.

    task: its name, which files are called by; legend: what the numbers are; values: everything
    measured, plain values without nan; metrics: figures by name, for the run's tracking;
    about: what was evaluated, plain values.
    """

    task: str
    legend: str
    grids: list[Grid]
    values: dict[str, Any]
    metrics: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)

    def tables(self) -> Iterator[Table]:
        """The tables for a terminal."""
        for grid in self.grids:
            table = Table(title=grid.title)
            for number, name in enumerate(grid.header):
                table.add_column(name, justify="right" if number else "left", no_wrap=True)
            for row in grid.rows:
                table.add_row(*row)
            yield table

    def markdown(self) -> str:
        """The legend and all tables in Markdown."""
        parts = [self.legend + "\n"]
        parts += [
            f"**{grid.title}**\n\n{markdown_table(grid.header, grid.rows)}" for grid in self.grids
        ]
        return "\n".join(parts)

    def to_json(self) -> str:
        """Everything that was measured."""
        value = {
            "format": f"ttt-megatron-evaluation-{self.task}-1",
            "about": self.about,
            "legend": self.legend,
            **self.values,
        }
        return json.dumps(value, indent=1, allow_nan=False) + "\n"

    def finite_metrics(self) -> dict[str, float]:
        """`metrics` by the task's name, without what is no number."""
        return {
            f"{self.task}/{name}": value
            for name, value in self.metrics.items()
            if math.isfinite(value)
        }
