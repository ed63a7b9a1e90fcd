"""`ttt-megatron dashboard`: a run at a glance, as one page and one picture."""

import argparse
from pathlib import Path

NAME = "dashboard"
HELP = "Draw a run's whole course as one HTML page and one PNG, from what lies in its folder."
EPILOG = """examples:
  ttt-megatron dashboard runs/3b-8k
  ttt-megatron dashboard runs/3b-8k --output reports/3b-8k
  ttt-megatron dashboard runs/3b-8k --log        also as artifacts of its MLflow run

The page needs no network: it can be sent by mail, or opened where it lies. A run that goes on may
be looked at too. Runs that log to MLflow write both files at their end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder (training.output)")
    add(
        "--output", metavar="FOLDER", help="folder for dashboard.html and .png (default: the run's)"
    )
    add("--log", action="store_true", help="also log both to the run's MLflow run")


def run(args: argparse.Namespace) -> int:
    """Writes the files; raises UserError for whatever the user can fix."""
    from ttt_megatron.errors import UserError
    from ttt_megatron.tracking.state import read_tracking
    from ttt_megatron.tracking.store import in_words, open_client
    from ttt_megatron.training.dashboard.history import read_history
    from ttt_megatron.training.dashboard.page import write_dashboard

    folder = Path(args.run)
    tracked = read_tracking(folder)
    if args.log and not tracked:
        raise UserError(f"--log: {folder} has no MLflow run; give it one with ttt-megatron upload")
    files = write_dashboard(read_history(folder), Path(args.output or args.run))
    for file in files:
        print(file)
    if args.log:
        try:
            client = open_client(tracked["uri"])
            for file in files:
                client.log_artifact(tracked["run_id"], str(file))
        except Exception as error:  # whatever MLflow, its store or the network raises
            raise UserError(
                f"MLflow at {tracked['uri']} did not take them ({in_words(error)})"
            ) from None
        print(f"logged to MLflow run {tracked['run_id']} at {tracked['uri']}")
    return 0
