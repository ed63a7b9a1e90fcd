"""`ttt-megatron cancel`: cancel jobs, and those that wait for them."""

import argparse

from ttt_megatron.cli.status import add_root

NAME = "cancel"
HELP = "Cancel jobs, and those that wait for them."
EPILOG = """examples:
  ttt-megatron cancel 4711              it saves after its current step; what waits for it goes too
  ttt-megatron cancel 4711 --now        it is ended at once, with what its last checkpoint holds

The same recipe, submitted again, goes on from the newest checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("jobs", nargs="+", metavar="JOB", help="numbers, runs' names or folders")
    add_root(parser)
    add("--now", action="store_true", help="do not let a running job save first")


def run(args: argparse.Namespace) -> int:
    """Cancels; raises UserError for jobs that there are not."""
    from ttt_megatron.cluster.cancel import cancel_jobs, with_dependents
    from ttt_megatron.cluster.records import find_record, read_records

    chosen = [find_record(args.root, word) for word in args.jobs]
    records = with_dependents(chosen, read_records(args.root))
    names = {record.job_id: record.name for record in records}
    for job, done in cancel_jobs(records, now=args.now).items():
        print(f"job {job} ({names[job]}): {done}")
    return 0
