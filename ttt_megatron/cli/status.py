"""`ttt-megatron status`: how far submitted jobs are."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.errors import UserError

if TYPE_CHECKING:
    from ttt_megatron.cluster.status import JobStatus

NAME = "status"
HELP = "Show how far submitted jobs are: their state, newest checkpoint and last loss."
EPILOG = """examples:
  ttt-megatron status                              jobs of runs/, those that have not ended first
  ttt-megatron status 4711 3b-pretrain-e2e-8k      by number, by the run's name
  ttt-megatron status --root demo/runs --json

`checkpoint` is the step from which the run would go on, `step` the last one logged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("jobs", nargs="*", metavar="JOB", help="numbers, runs' names or folders (default: all)")
    add_root(parser)
    add("--json", action="store_true", help="print a JSON list instead of a table")


def add_root(parser: argparse.ArgumentParser) -> None:
    """Adds --root, which all commands about jobs have."""
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="folder with jobs.jsonl, in which the runs lie (default: runs)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; raises UserError for jobs that there are not."""
    from ttt_megatron.cluster.records import JOBS_FILE, find_record, read_records
    from ttt_megatron.cluster.status import as_json, read_status

    records = [find_record(args.root, word) for word in args.jobs] or read_records(args.root)
    if not records:
        raise UserError(
            f"{args.root / JOBS_FILE} is not there: submit a recipe first, or give the folder in "
            "which the runs lie as --root"
        )
    found = read_status(records)
    if args.json:
        print(json.dumps([as_json(status) for status in found], indent=1))
    else:
        _print(sorted(found, key=lambda status: not status.active))
    return 0


def _print(found: "list[JobStatus]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("job", "run", "state", "attempt", "nodes", "checkpoint", "step", "loss", "left"):
        right = name in ("attempt", "nodes", "checkpoint", "step", "loss", "left")
        table.add_column(name, justify="right" if right else "left")
    for one in found:
        waits = f" after {', '.join(one.record.after)}" if one.record.after and one.active else ""
        age = "" if one.saved is None else f" ({_duration(one.saved)} ago)"
        table.add_row(
            one.job_id,
            one.record.name,
            one.state + (waits if "waiting" in one.state else ""),
            str(one.attempt or "-"),
            str(one.record.nodes),
            f"{one.checkpoint}{age}",
            f"{one.step} of {one.record.steps}",
            "-" if one.loss is None else f"{one.loss:.4f}",
            "-" if one.left is None else _duration(one.left),
        )
    # Numbers cut short would be of no use: a narrow terminal wraps the lines instead.
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
