"""`ttt-megatron upload`: what runs have for MLflow and it has not got yet."""

import argparse
import logging
import sys
from pathlib import Path

NAME = "upload"
HELP = "Upload to MLflow what runs could not, or were not to, log while they trained."
EPILOG = """examples:
  ttt-megatron upload runs/3b-8k
  ttt-megatron upload runs/*                    several; folders that hold no run are passed over
  MLFLOW_TRACKING_URI=https://mlflow.example ttt-megatron upload runs/3b-8k
  ttt-megatron upload runs/3b-8k --to https://mlflow.example

A run that was logged goes on in its MLflow run, and nothing is there twice; the command may be
interrupted and given again. One that was trained with tracking.mlflow=false is uploaded from its
metrics log. The store is --to, else the one the run has begun to log to, else as for training;
who logs in is told by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
MLFLOW_TRACKING_TOKEN."""

EXIT_NOT_ALL = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments to `parser`."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder (training.output)")
    add("--to", metavar="URI", help="the MLflow store, without a password")
    add("--dry-run", action="store_true", help="only tell what is still to upload")


def run(args: argparse.Namespace) -> int:
    """Uploads; the status is 1 if a store could not be reached for some run."""
    from ttt_megatron.errors import UserError
    from ttt_megatron.training.late_upload import chosen_store, is_run, prepare_upload, upload_run

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    folders = [Path(word) for word in args.runs]
    found = [folder for folder in folders if is_run(folder)]
    if not found:
        raise UserError(f"{folders[0]} holds no run: give a run's folder (training.output)")
    failed = 0
    for folder in found:
        uri = chosen_store(folder, args.to)
        uploader = prepare_upload(folder, uri, write=not args.dry_run)
        if args.dry_run:
            left = "not in MLflow at all" if uploader is None else f"{uploader.left()} to upload"
            print(f"{folder}: {left} ({uri})")
            continue
        assert uploader is not None
        problem = upload_run(uploader)
        if problem is None:
            print(f"{folder}: MLflow run {uploader.run_id} at {uri}")
        else:
            failed += 1
            print(f"error: {folder}: {problem}; {uploader.left()} still to upload", file=sys.stderr)
    return EXIT_NOT_ALL if failed else 0
