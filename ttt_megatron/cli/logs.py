"""`ttt-megatron logs`: show or follow a job's log."""

import argparse
import sys
from pathlib import Path

from ttt_megatron.cli.status import add_root
from ttt_megatron.errors import UserError

NAME = "logs"
HELP = "Show or follow the log of a job's last attempt."
EPILOG = """examples:
  ttt-megatron logs 4711 --follow
  ttt-megatron logs runs/3b-pretrain-e2e-8k --all       of the newest job of a run, every attempt
  ttt-megatron logs 4712_3 --lines 20                   of a task of an array"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("job", metavar="JOB", help="a job's number, its run's name or folder")
    add_root(parser)
    add("--follow", action="store_true", help="go on until the job has ended")
    add("--all", action="store_true", help="all attempts, not the last one alone")
    add("--lines", type=int, metavar="N", help="the last lines alone")


def run(args: argparse.Namespace) -> int:
    """Prints the log; raises UserError if there is none yet."""
    from ttt_megatron.cluster.logs import follow, last_attempt, last_lines
    from ttt_megatron.cluster.records import find_record

    word, _, index = args.job.partition("_") if args.job[:1].isdigit() else (args.job, "", "")
    record = find_record(args.root, word)
    if record.tasks and index not in record.tasks:
        raise UserError(
            f"job {record.job_id} is an array: name one of its tasks, {record.job_id}_"
            f"{next(iter(record.tasks))} to {record.job_id}_{list(record.tasks)[-1]}"
        )
    task = f"{record.job_id}_{index}" if record.tasks else record.job_id
    path = Path(record.folder) / f"{task}.log"
    try:
        log = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"job {task} has not begun, there is no {path} yet") from None
    shown = log if args.all else last_attempt(log)
    if args.lines is not None:
        shown = last_lines(shown, args.lines)
    _write(shown)
    if args.follow:
        for more in follow(path, len(log), record, task):
            _write(more)
    return 0


def _write(text: bytes) -> None:
    sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
