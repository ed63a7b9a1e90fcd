"""The report: its sections in order, as one Markdown file and one PNG."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.evaluation.task_report import Grid
from ttt_megatron.reporting.curves import BY_CONTEXT, BY_POSITION, curves_section
from ttt_megatron.reporting.evaluations import (
    lacking,
    refuse_unevaluated,
    refuse_unevaluated_reference,
)
from ttt_megatron.reporting.facts import facts_section
from ttt_megatron.reporting.latency import latency_section
from ttt_megatron.reporting.needles import needle_section
from ttt_megatron.reporting.runs import Subjects
from ttt_megatron.reporting.section import Section, draw_sections
from ttt_megatron.reporting.small_tables import decode_section, leakage_section
from ttt_megatron.reporting.systems import systems_section
from ttt_megatron.sweeps.plot import draw_panel
from ttt_megatron.sweeps.results import SweepResults, write_whole
from ttt_megatron.sweeps.tables import LEGEND, rows, unfinished

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEM = "report"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A report's sections under its title."""

    title: str
    sections: list[Section]

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of all sections by name."""
        return {name: value for s in self.sections for name, value in s.metrics.items()}

    def markdown(self, picture: str | None) -> str:
        """The document; `picture` is the file beside it that it shows."""
        image = f"![{self.title}]({picture})\n\n" if picture else ""
        return f"# {self.title}\n\n{image}" + "\n".join(s.markdown() for s in self.sections)

    def write(self, folder: Path) -> list[Path]:
        """Writes report.md and, if there is anything to draw, report.png; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        text, picture = folder / f"{STEM}.md", folder / f"{STEM}.png"
        drawn = draw_sections(self.sections, picture, self.title)
        write_whole(text, self.markdown(picture.name if drawn else None))
        return [text, picture] if drawn else [text]


def make_report(subjects: Subjects, title: str, reference: str | None) -> Document:
    """Everything that was measured of the subjects.

    `reference` is the label of the group of runs that others are compared with, None for the first.

    Raises UserError if nothing was measured, two runs were evaluated on different documents, or the
    reference was not evaluated.
    """
    refuse_unevaluated(subjects)
    for group in subjects.groups:
        if group.label == reference:
            refuse_unevaluated_reference(group)
    return Document(title=title, sections=list(_sections(subjects, reference)))


def _sections(subjects: Subjects, reference: str | None) -> Iterator[Section]:
    groups = subjects.groups
    if groups:
        yield facts_section(groups)
    yield from (_ablation(sweep) for sweep in subjects.sweeps)
    found = (
        curves_section(groups, BY_POSITION, reference),
        curves_section(groups, BY_CONTEXT, reference),
        needle_section(groups),
        decode_section(groups),
        leakage_section(groups),
        latency_section(subjects.benches),
        systems_section(subjects.benches),
    )
    yield from (section for section in found if section is not None)
    missing = lacking(subjects)
    if missing:
        yield Section(title="Not measured", text=missing)


def _ablation(sweep: SweepResults) -> Section:
    header, body = rows(sweep)
    means = {group: sweep.mean(group, sweep.loss) for group in sweep.groups}
    loose = "".join(f"* {line}\n" for line in unfinished(sweep))
    return Section(
        title=f"Ablation: {sweep.name}",
        text=f"{LEGEND} Base: `{sweep.base}`.\n\n{loose}",
        grids=[Grid(title="", header=header, rows=body)],
        panels=[partial(_draw_ablation, sweep, n) for n in range(max(1, len(sweep.axes)))]
        if any(mean.seeds for mean in means.values())
        else [],
        metrics={f"{sweep.name}/{g}/{sweep.loss}": m.mean for g, m in means.items() if m.seeds},
    )


def _draw_ablation(sweep: SweepResults, number: int, axis: "Axes") -> None:
    draw_panel(sweep, number, axis)
    axis.set_title(sweep.name)
