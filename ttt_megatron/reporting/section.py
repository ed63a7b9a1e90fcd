"""A part of a report: its text, its tables, its pictures, its figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.evaluation.formatting import markdown_table
from ttt_megatron.evaluation.pictures import new_figure, save_figure
from ttt_megatron.evaluation.task_report import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2
Panel = Callable[["Axes"], None]
"""Draws on Matplotlib's axes."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is below it.

    metrics are figures by name, for a run's tracking.
    """

    title: str
    text: str = ""
    grids: list[Grid] = field(default_factory=list)
    panels: Sequence[Panel] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        """As a part of a document."""
        parts = [f"## {self.title}", self.text.strip()]
        for grid in self.grids:
            heading = f"**{grid.title}**\n\n" if grid.title else ""
            parts.append(heading + markdown_table(grid.header, grid.rows).rstrip())
        return "\n\n".join(part for part in parts if part) + "\n"


def draw_sections(sections: Sequence[Section], path: Path, title: str) -> bool:
    """All panels in one PNG, two beside each other; False if there are none."""
    panels = [panel for section in sections for panel in section.panels]
    if not panels:
        return False
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, width=7.5 * columns, height=0.5 + 4.5 * rows)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.suptitle(title)
    save_figure(figure, path)
    return True
