"""Tables and what stands in their cells: durations, shares, bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from ttt_megatron.bench.results import MEASURED, Result

NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, names of columns, rows of text; `left` columns are words, the rest numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int
    note: str = ""

    def markdown(self) -> str:
        """With a bold heading."""
        rule = ["---"] * self.left + ["---:"] * (len(self.columns) - self.left)
        lines = [_pipe(row) for row in (self.columns, tuple(rule), *self.rows)]
        parts = [f"**{self.title}**", "\n".join(lines)]
        return "\n\n".join([*parts, self.note] if self.note else parts)

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=self.title,
            title_justify="left",
            caption=self.note or None,
            caption_justify="left",
        )
        for number, name in enumerate(self.columns):
            justify = "left" if number < self.left else "right"
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*row)
        return table


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    if seconds is None:
        return NONE
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def digits(value: float) -> str:
    """Three digits, no decimals from 100 on."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return NONE if value is None else f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"


def spread(one: Result) -> str:
    """How far repetitions lie apart, in percent of their median."""
    return NONE if one.spread is None else f"±{percent(one.spread)}"


def size_of_bytes(size: int | None) -> str:
    """In MiB or GiB."""
    if size is None:
        return NONE
    return f"{digits(size / 2**30)} GiB" if size >= 2**30 else f"{digits(size / 2**20)} MiB"


def median(one: Result) -> str:
    """Of a result, or why there is none."""
    return duration(one.median) if one.status == MEASURED else one.status


def notes(rows: list[Result]) -> str:
    """Why something was not measured."""
    reasons = dict.fromkeys(
        f"{' '.join(filter(None, (one.name, one.way)))}: {one.reason}"
        for one in rows
        if one.status != MEASURED and one.reason
    )
    return "; ".join(reasons)
