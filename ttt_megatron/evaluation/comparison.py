"""Evaluations of the same documents side by side, one of their curves being the reference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.formatting import markdown_table, mean_cell
from ttt_megatron.evaluation.report import PositionReport, read_report

_REPORT = "by_position.json"
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Curves of several evaluations, joined.

    report: all of them over the same documents, the reference first; groups: by evaluation's label,
    the curves' short names and their names in the report; window_size: tokens that attention sees,
    or None.
    """

    report: PositionReport
    groups: dict[str, dict[str, str]]
    window_size: int | None

    @property
    def reference(self) -> str:
        """The curve that all others are compared with: the first evaluation's first."""
        return next(iter(self.report.curves))

    @property
    def legend(self) -> str:
        """What the cells of the tables are."""
        return (
            f"Nats a token; in brackets the difference to ({self.reference}) ± standard error over "
            "documents."
        )

    def tables(self) -> Iterator[Table]:
        """A table an evaluation, each narrow enough for a terminal."""
        for label, curves in self.groups.items():
            table = Table(title=label)
            table.add_column("position", no_wrap=True)
            for short in curves:
                table.add_column(short, justify="right", no_wrap=True)
            table.add_column("documents", justify="right", no_wrap=True)
            rows = self._rows(list(curves.values()))
            for number, row in enumerate(rows):
                table.add_row(*row, end_section=number == len(rows) - 2)
            yield table

    def markdown(self) -> str:
        """One table of everything, in Markdown, and the findings below it."""
        header = ["position", *self.report.curves, "documents"]
        table = markdown_table(header, self._rows(list(self.report.curves)))
        return f"{self.legend}\n\n{table}\n" + "".join(f"* {text}\n" for text in self.findings())

    def findings(self) -> list[str]:
        """Where beyond the window the reference is below the others of its own evaluation, and
        below the same way of reading in the other evaluations; a sentence each."""
        report, window = self.report, self.window_size or 0
        beyond = [
            number
            for number, bucket in enumerate(report.buckets)
            if bucket.start >= window and report.mean(self.reference, number).documents
        ]
        if not beyond:
            return []
        where = f"beyond the window of {window} tokens" if window else "of all"
        sentences = []
        for other in self._rivals():
            gaps = {n: report.difference(other, self.reference, n) for n in beyond}
            lower = sum(gap.mean > 0 for gap in gaps.values())
            number, gap = max(gaps.items(), key=lambda item: item[1].mean)
            bucket = report.buckets[number]
            sentences.append(
                f"{self.reference} is below {other} in {lower} of {len(beyond)} ranges {where}; "
                f"most at {bucket.start}-{bucket.stop}, by {mean_cell(gap, digits=2)} nats a token."
            )
        return sentences

    def _rivals(self) -> list[str]:
        own, *others = self.groups.values()
        short, *rest = own
        return [own[name] for name in rest] + [each[short] for each in others if short in each]

    def styles(self) -> dict[str, dict[str, Any]]:
        """How curves are drawn: a colour for each short name, a line style for each evaluation."""
        shorts = list(dict.fromkeys(short for group in self.groups.values() for short in group))
        colours = {short: f"C{number}" for number, short in enumerate(shorts)}
        return {
            name: {"color": colours[short], "linestyle": line}
            for curves, line in zip(self.groups.values(), cycle(_LINES), strict=False)
            for short, name in curves.items()
        }

    def _rows(self, curves: list[str]) -> list[list[str]]:
        """Cells of every range of positions, and of all."""
        report, rows = self.report, []
        for number, bucket in enumerate([*report.buckets, None]):
            chosen = None if bucket is None else number
            label = "all" if bucket is None else f"{bucket.start}-{bucket.stop}"
            documents = str(report.mean(self.reference, chosen).documents)
            rows.append([label, *(self._cell(curve, chosen) for curve in curves), documents])
        return rows

    def _cell(self, curve: str, bucket: int | None) -> str:
        mean = self.report.mean(curve, bucket)
        if not mean.documents:
            return "-"
        if curve == self.reference:
            return f"{mean.mean:.2f}"
        difference = self.report.difference(curve, self.reference, bucket)
        return f"{mean.mean:.2f} ({mean_cell(difference, '+', 2)})"


def compare(reports: Mapping[str, PositionReport]) -> Comparison:
    """Joins evaluations by label; the first one's first curve is the reference.

    Raises UserError if they read different documents, or there is none.
    """
    if not reports:
        raise UserError("there is nothing to compare: give the evaluations of one run or more")
    joined: PositionReport | None = None
    groups: dict[str, dict[str, str]] = {}
    for label, report in reports.items():
        groups[label] = names = {short: f"{short}, {label}" for short in report.curves}
        if joined is None:
            curves = {names[short]: sums for short, sums in report.curves.items()}
            joined = replace(report, curves=curves, about={"compared": {}, **report.about})
        else:
            _check_same_data(joined, report, label)
            joined = joined.joined(report, names)
    assert joined is not None
    joined.about["compared"] = {label: report.about for label, report in reports.items()}
    window = joined.about.get("window_size")
    return Comparison(report=joined, groups=groups, window_size=window)


def find_report(path: Path) -> PositionReport:
    """Reads an evaluation from its JSON, its folder or its run's folder.

    Raises UserError if there is none, or it is something else.
    """
    for candidate in (path, path / _REPORT, path / "evaluation" / _REPORT):
        if candidate.is_file():
            return read_report(candidate)
    raise UserError(
        f"{path} is neither a {_REPORT} nor a folder that holds one: run "
        f"`ttt-megatron evaluate` first"
    )


def _check_same_data(first: PositionReport, other: PositionReport, label: str) -> None:
    """The names of documents alone do not say that their tokens are the same."""
    key = "data_fingerprint"
    if first.about.get(key) != other.about.get(key):
        raise UserError(
            f"the evaluation {label!r} read other data ({other.about.get('data')}) than the first "
            f"({first.about.get('data')}): evaluate both with the same --data"
        )
