"""Put what `tools/gpu_report.sh` measured into docs/benchmarks.md, beside what is aimed at.

    python tools/gpu_tables.py docs/benchmarks.md --results docs/benchmarks/h200
    python tools/gpu_tables.py docs/benchmarks.md

Replaces what stands between the markers <!-- gpu:begin --> and <!-- gpu:end -->; without --results
by the targets alone, not measured. A folder of results holds PART.json of `ttt-megatron bench`,
PART.png, and checks.tsv: part, outcome, seconds and last words, by tabs. Prints checks and targets.
"""

import argparse
import os
import sys
from pathlib import Path

from gpu_targets import NOT_MEASURED, Target, targets_of

from ttt_megatron.bench.results import Report, read_report, write_beside
from ttt_megatron.bench.tables import LEGEND, Table, heading, tables_of
from ttt_megatron.errors import UserError

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
PARTS = {
    "kernels": "Kernels",
    "steps": "Meta steps",
    "long": "Meta steps of longer sequences",
    "latency": "One chunk, prompts and decoding",
}


def read_checks(folder: Path) -> Table | None:
    """What every part came to; None if nobody wrote it down."""
    path = folder / "checks.tsv"
    if not path.exists():
        return None
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        part, outcome, seconds, *words = line.split("\t")
        rows.append((part, outcome, seconds, " ".join(words)))
    columns = ("part", "outcome", "seconds", "its last words")
    return Table(title="Parts of the report", columns=columns, rows=rows, left=4)


def target_table(targets: list[Target]) -> Table:
    """Wanted and measured, side by side."""
    rows = [(one.what, one.wanted, one.measured, one.verdict) for one in targets]
    columns = ("", "target", "measured", "reached")
    return Table(title="Targets on an H200", columns=columns, rows=rows, left=1)


def section(reports: dict[str, Report], checks: Table | None, targets: Table, folder: str) -> str:
    """The text between the markers; `folder` is that of the results, seen from the document."""
    if not reports and checks is None:
        intro = (
            "No figure of this section is measured yet. `tools/gpu_report.sh` fills it in on a "
            "machine with a GPU, within ten minutes."
        )
        return f"{intro}\n\n{targets.markdown()}"
    parts = [f"Measured by `tools/gpu_report.sh`; raw figures in [{folder}]({folder})."]
    parts += [targets.markdown()] + ([checks.markdown()] if checks else [])
    for name, report in reports.items():
        parts += [f"### {PARTS[name]}", heading(report.about)]
        parts += [table.markdown() for table in tables_of(report)]
        parts += [f"![{PARTS[name]}]({folder}/{name}.png)"]
    return "\n\n".join([*parts, LEGEND] if reports else parts)


def replace_section(text: str, new: str, path: Path) -> str:
    """The document with `new` between its markers; UserError if it has not one of each, in turn."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} has no line {BEGIN} before a line {END}: add them")
    return f"{before}{BEGIN}\n{new}\n\n{END}{after}"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path, help="the Markdown file with the markers")
    parser.add_argument("--results", type=Path, help="folder of PART.json and checks.tsv")
    arguments = parser.parse_args()
    document, folder = arguments.document, arguments.results
    try:
        if not document.is_file():
            raise UserError(f"{document} does not exist: name the file that has the markers")
        if folder is not None and not folder.is_dir():
            raise UserError(f"--results {folder}: there is no such folder")
        reports = {
            name: read_report(folder / f"{name}.json")
            for name in PARTS
            if folder is not None and (folder / f"{name}.json").exists()
        }
        checks = None if folder is None else read_checks(folder)
        targets = target_table(targets_of([one for r in reports.values() for one in r.results]))
        seen = "" if folder is None else os.path.relpath(folder, document.parent)
        text = document.read_text(encoding="utf-8")
        new = section(reports, checks, targets, seen)
        write_beside(document, replace_section(text, new, document))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for table in filter(None, (checks, targets)):
        print_table(table)
    left = sum(row[2] == NOT_MEASURED for row in targets.rows)
    print(f"{len(targets.rows) - left} of {len(targets.rows)} targets measured")
    return 0


def print_table(table: Table) -> None:
    """In columns."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns) - 1)]
    print(f"\n{table.title}")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  " + "  ".join([*cells, row[-1]]).rstrip())


if __name__ == "__main__":
    sys.exit(main())
