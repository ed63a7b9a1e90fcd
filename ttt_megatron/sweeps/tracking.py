"""The sweep's own MLflow run, under which those of its points are shown."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ttt_megatron.evaluation.tracking import log_evaluation
from ttt_megatron.sweeps.points import Point, show_value, with_tracking
from ttt_megatron.sweeps.spec import Sweep
from ttt_megatron.tracking.state import read_tracking, write_tracking
from ttt_megatron.tracking.store import (
    STORE_VARIABLE,
    experiment_id,
    in_words,
    open_client,
    tracking_uri,
)

logger = logging.getLogger(__name__)

_LOCK_FILE = ".lock"
_VALUE_LENGTH = 500


def track_points(points: Sequence[Point], sweep: Sweep, output: Path) -> list[Point]:
    """The points under one parent run, which the sweep's folder remembers and later calls keep.

    Points of recipes with tracking.mlflow = false stay as they are. A store that cannot be reached
    is warned about; the points then have no parent.
    """
    tracked = [point for point in points if point.config.tracking.mlflow]
    if not tracked:
        return list(points)
    # Beside the sweep's folder, as it would be for a run.
    tracking = tracked[0].config.tracking
    uri = tracking_uri(tracking, output)
    parent = None
    with _at_most_one(output), _warned(uri):
        parent = _continued(uri, output) or _created(uri, tracking.experiment, sweep, output)
    # A store from the environment is not written down: its address may hold a password.
    from_outside = tracking.tracking_uri is None and os.environ.get(STORE_VARIABLE)
    stored = None if from_outside else uri
    return [with_tracking(p, stored, parent) if p.config.tracking.mlflow else p for p in points]


def log_results(
    output: Path, values: Mapping[str, float], files: Sequence[Path], *, finished: bool
) -> str | None:
    """Figures and files into the sweep's run, which ends once every point is finished.

    Returns where they are, in words; None if they could not be logged.
    """
    tracked = read_tracking(output)
    if not tracked:
        return None
    uri, run = tracked["uri"], tracked["run_id"]
    logged = log_evaluation(uri, run, values, 0, files)
    if finished:
        with _warned(uri):
            open_client(uri).set_terminated(run, "FINISHED")
    return f"{uri}  (run {run} and below it)" if logged else None


def mark_failed(points: Iterable[Point]) -> None:
    """Ends the MLflow runs of points whose processes could not do so themselves."""
    for point in points:
        tracked = read_tracking(point.folder)
        if tracked:
            with _warned(tracked["uri"]):
                open_client(tracked["uri"]).set_terminated(tracked["run_id"], "FAILED")


def _continued(uri: str, output: Path) -> str | None:
    known = read_tracking(output)
    if known.get("uri") != uri:
        return None
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException):
        open_client(uri).update_run(known["run_id"], status="RUNNING")
        return known["run_id"]
    return None


def _created(uri: str, experiment: str, sweep: Sweep, output: Path) -> str:
    client = open_client(uri)
    identifier = experiment_id(client, uri, experiment)
    run: str = client.create_run(identifier, run_name=sweep.name).info.run_id
    client.log_param(run, "base", str(sweep.base))
    for axis in sweep.axes:
        for number, key in enumerate(axis.keys):
            values = ", ".join(show_value(place[number]) for place in axis.values)
            client.log_param(run, key, values[:_VALUE_LENGTH])
    if sweep.seeds:
        client.log_param(run, "seeds", ", ".join(map(str, sweep.seeds))[:_VALUE_LENGTH])
    client.log_text(run, Path(sweep.source).read_text(encoding="utf-8"), "sweep.yaml")
    write_tracking(output, uri, run)
    return run


@contextmanager
def _at_most_one(output: Path) -> Iterator[None]:
    """Several processes of one sweep begin at once where a batch system starts them."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK_FILE).open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _warned(uri: str) -> Iterator[None]:
    """Whatever MLflow, its store or the network raises: the runs matter more."""
    try:
        yield
    except Exception as error:
        logger.warning("MLflow at %s: %s; the sweep goes on", uri, in_words(error))
