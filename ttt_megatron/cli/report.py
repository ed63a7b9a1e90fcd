"""`ttt-megatron report`: runs, sweeps and benchmarks in one document."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.reporting.document import Document
    from ttt_megatron.reporting.runs import Subjects

NAME = "report"
HELP = "Put what was measured of runs and sweeps into one document with one picture."
EPILOG = """examples:
  ttt-megatron report runs/stage2 runs/control --output reports/demo
  ttt-megatron report ours=runs/a plain=runs/b --reference runs/b --output reports/pair
  ttt-megatron report runs/sweeps/small-window results/bench.json --output reports/window

Runs that differ in training.seed alone are put together, with standard errors over seeds. What
`ttt-megatron evaluate` left in a run's folder is read, and what it has not measured is listed with
the command that does."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="[LABEL=]PATH",
        help="a run's folder, a sweep's, or a bench.json (LABEL: the run's name)",
    )
    add("--output", required=True, metavar="FOLDER", help="folder for report.md and report.png")
    add("--title", default="Report", metavar="TEXT", help="default: %(default)s")
    add(
        "--reference",
        metavar="RUN",
        help="differences are to this run, by folder or label (default: the first)",
    )
    add("--log-to", metavar="RUN", help="also log it to this run's, or sweep's, MLflow run")


def run(args: argparse.Namespace) -> int:
    """Writes the report; raises UserError for whatever the user can fix."""
    from ttt_megatron.reporting.document import make_report
    from ttt_megatron.reporting.runs import find_subjects
    from ttt_megatron.tracking.state import read_tracking

    if args.log_to and not read_tracking(Path(args.log_to)):
        raise UserError(f"--log-to {args.log_to}: no MLflow run belongs to this folder")
    subjects = find_subjects(args.runs)
    reference = None if args.reference is None else _reference(args.reference, subjects)
    document = make_report(subjects, args.title, reference)
    files = document.write(Path(args.output))
    for path in files:
        print(path)
    if args.log_to:
        _log(document, Path(args.log_to), files)
    return 0


def _reference(word: str, subjects: "Subjects") -> str:
    """The label of the group that holds the run of this folder or label."""
    for group in subjects.groups:
        for one in group.runs:
            if word in (one.label, group.label) or Path(word).resolve() == one.folder.resolve():
                return group.label
    raise UserError(
        f"--reference {word} is none of the runs ({', '.join(g.label for g in subjects.groups)}): "
        "give it among them too"
    )


def _log(document: "Document", folder: Path, files: list[Path]) -> None:
    from ttt_megatron.evaluation.tracking import log_evaluation
    from ttt_megatron.tracking.state import read_tracking

    tracked = read_tracking(folder)
    uri, run_id = tracked["uri"], tracked["run_id"]
    # What MLflow takes in a metric's name.
    metrics = {
        "report/" + re.sub(r"[^\w./ -]", "-", name): value
        for name, value in document.metrics.items()
    }
    if log_evaluation(uri, run_id, metrics, 0, files):
        print(f"logged to MLflow run {run_id} at {uri}")
