"""An evaluation in the MLflow run that trained the model."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ttt_megatron.tracking.journal import ARTIFACT, JOURNAL_FILE, Journal, Record, metrics_record
from ttt_megatron.tracking.state import read_tracking
from ttt_megatron.tracking.store import in_words, open_client

logger = logging.getLogger(__name__)

_FOLDER = "evaluation"


def log_to_run(
    run_folder: Path, metrics: Mapping[str, float], step: int, files: Sequence[Path]
) -> str | None:
    """Logs an evaluation to the MLflow run of a folder; where that cannot be now, keeps it in the
    run's journal for `ttt-megatron upload`. Returns what was done, in words; None if nothing."""
    tracked = read_tracking(run_folder)
    if tracked and log_evaluation(tracked["uri"], tracked["run_id"], metrics, step, files):
        return f"logged to MLflow run {tracked['run_id']} at {tracked['uri']}"
    journal = run_folder / JOURNAL_FILE
    if not journal.exists():
        return None
    named = {f"{_FOLDER}/{name}": value for name, value in metrics.items()}
    records: list[Record] = [metrics_record(named, step, int(time.time() * 1000))]
    records += [
        {"kind": ARTIFACT, "file": str(path.resolve()), "folder": _FOLDER} for path in files
    ]
    try:
        Journal(journal).append(records)
    except OSError as error:
        logger.warning("%s cannot be written (%s)", journal, error)
        return None
    return f"kept for MLflow: ttt-megatron upload {run_folder}"


def log_evaluation(
    uri: str, run_id: str, metrics: Mapping[str, float], step: int, files: Sequence[Path]
) -> bool:
    """Logs figures at `step` and files to a run; returns whether that worked.

    Never raises for what MLflow, its store or the network does: it warns, and the files stay where
    they are.
    """
    try:
        from mlflow.entities import Metric

        client = open_client(uri)
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        client.log_batch(
            run_id,
            metrics=[Metric(f"{_FOLDER}/{n}", v, now, step) for n, v in finite.items()],
        )
        for path in files:
            client.log_artifact(run_id, str(path), _FOLDER)
    except Exception as error:
        logger.warning("MLflow at %s did not take the evaluation (%s)", uri, in_words(error))
        return False
    return True
