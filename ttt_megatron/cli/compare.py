"""`ttt-megatron compare`: evaluations of several checkpoints side by side."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.evaluation.comparison import Comparison
    from ttt_megatron.evaluation.report import PositionReport

NAME = "compare"
HELP = "Put evaluations of the same documents side by side."
EPILOG = """examples:
  ttt-megatron compare runs/stage2 runs/stage1
  ttt-megatron compare after=runs/stage2 before=runs/stage1 --output results --log-to runs/stage2

What `ttt-megatron evaluate` wrote is read; evaluate all with the same data, --length and
--documents. The first curve of the first evaluation is the reference: differences are to it,
paired by document, with standard errors over documents."""

_STEM = "comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add(
        "evaluations",
        nargs="+",
        metavar="[LABEL=]PATH",
        help="a run's folder, or the folder or JSON of an evaluation (LABEL: the run's name)",
    )
    add("--title", default="loss by position", metavar="TEXT", help="default: %(default)s")
    add("--output", metavar="DIR", help=f"write {_STEM}.json, .md and .png into DIR")
    add("--log-to", metavar="RUN", help="also log them to this run's MLflow run; needs --output")


def run(args: argparse.Namespace) -> int:
    """Prints tables, writes and logs files; raises UserError for whatever the user can fix."""
    if args.log_to and not args.output:
        raise UserError(f"--log-to {args.log_to} logs files: add --output DIR")
    from ttt_megatron.evaluation.comparison import compare

    comparison = compare(_read(args.evaluations))
    _print(comparison)
    if args.output:
        files = _write(comparison, Path(args.output), args.title)
        if args.log_to:
            _log(comparison, Path(args.log_to), files)
    return 0


def _read(evaluations: list[str]) -> "dict[str, PositionReport]":
    from ttt_megatron.evaluation.comparison import find_report

    reports = {}
    for word in evaluations:
        label, found, path = word.rpartition("=")
        report = find_report(Path(path))
        label = label if found else str(report.about.get("name", Path(path).name))
        if label in reports:
            raise UserError(f"two evaluations are called {label!r}: name them, LABEL=PATH")
        reports[label] = report
    return reports


def _print(comparison: "Comparison") -> None:
    from rich.console import Console

    for table in comparison.tables():
        # Numbers cut short would be of no use: a narrow terminal wraps the lines instead.
        needed = Console(width=1000).measure(table).maximum
        Console(width=max(Console().width, needed)).print(table)
    for sentence in (comparison.legend, *comparison.findings()):
        print(sentence)


def _write(comparison: "Comparison", folder: Path, title: str) -> list[Path]:
    from ttt_megatron.evaluation.plot import draw_by_position

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{_STEM}{suffix}" for suffix in (".json", ".md", ".png")]
    texts = (comparison.report.to_json(), comparison.markdown())
    for path, text in zip(files, texts, strict=False):
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    draw_by_position(
        comparison.report, files[-1], title, comparison.window_size, comparison.styles()
    )
    for path in files:
        print(path)
    return files


def _log(comparison: "Comparison", run_folder: Path, files: list[Path]) -> None:
    from ttt_megatron.evaluation.tracking import log_evaluation
    from ttt_megatron.tracking.state import read_tracking

    tracked = read_tracking(run_folder)
    if not tracked:
        raise UserError(f"--log-to {run_folder}: no MLflow run belongs to this folder")
    uri, run_id = tracked["uri"], tracked["run_id"]
    step = int(comparison.report.about.get("step", 0))
    # The figures are in the run already, from the evaluations themselves.
    if log_evaluation(uri, run_id, {}, step, files):
        print(f"logged to MLflow run {run_id} at {uri}")
