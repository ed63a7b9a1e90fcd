"""MLflow: what a run's figures, settings and results are followed by.

Everything goes through a queue to one background thread, so neither a slow server nor MLflow's own
start-up holds up a step; and nothing that fails there ends a run. What could not be delivered is
still in metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_megatron.config import to_yaml
from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig, TrackingConfig
from ttt_megatron.training.callbacks.base import Callback

if TYPE_CHECKING:
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

TRACKING_FILE = "mlflow.json"
_QUEUE_SIZE = 10_000
_RETRY_SECONDS = 30.0
_CLOSE_SECONDS = 60.0
_GATHER_SECONDS = 2.0
_PARAMETERS_A_CALL = 100
_METRICS_A_CALL = 1000
_VALUE_LENGTH = 500
_PLOTS = "*.png"
_PARENT = "mlflow.parentRunId"

# What the queue carries: measurements (name, value, milliseconds, step), something to do with
# (client, run), or None for the end.
Item = list[tuple[str, float, int, int]] | Callable[..., None] | None


def tracking_uri(tracking: TrackingConfig, output: Path) -> str:
    """The store: the recipe's, else MLFLOW_TRACKING_URI, else SQLite beside the run's folder."""
    chosen = tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return chosen or f"sqlite:///{output.resolve().parent / 'mlflow.db'}"


def read_tracking(output: Path) -> dict[str, str]:
    """`uri` and `run_id` of the run in an output folder; empty if it was never tracked."""
    try:
        values = json.loads((output / TRACKING_FILE).read_text())
        return {"uri": str(values["uri"]), "run_id": str(values["run_id"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_tracking(output: Path, uri: str, run_id: str) -> None:
    """Writes what `read_tracking` reads."""
    beside = output / f"{TRACKING_FILE}.tmp"
    beside.write_text(json.dumps({"uri": uri, "run_id": run_id}))
    beside.replace(output / TRACKING_FILE)


class MlflowTracking(Callback):
    """Logs to one MLflow run, which a resumed training continues; for the main rank."""

    def __init__(self, config: RunConfig, *, stopping_patience: float = _CLOSE_SECONDS) -> None:
        """`stopping_patience`: seconds to wait at the end for what is still queued."""
        self._config = config
        self._output = Path(config.training.output)
        self._uri = tracking_uri(config.tracking, self._output)
        self._patience = stopping_patience
        self._queue: queue.Queue[Item] = queue.Queue(_QUEUE_SIZE)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._warned = False

    def on_start(self, trainer: Trainer) -> None:
        """Starts the thread, which opens the run."""
        previous = read_tracking(self._output)
        self._trainer = trainer
        self._previous = previous.get("run_id") if previous.get("uri") == self._uri else None
        trainer.tracking_run = self._previous
        self._thread.start()
        for name, text in trainer.implementations.items():
            self._put(lambda client, run, name=name, text=text: client.set_tag(run, name, text))

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Queues the step's figures."""
        self._put_metrics(record.metrics(), record.step)

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Queues an evaluation's results."""
        self._put_metrics(metrics, step)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Queues the newest checkpoint's path."""
        where = str(path.resolve())
        self._put(lambda client, run: client.set_tag(run, "checkpoint", where))

    def on_end(self, trainer: Trainer) -> None:
        """Queues the plots and, after the last step, the end of the run."""
        for plot in sorted(self._output.glob(_PLOTS)):
            self._put(lambda client, run, plot=plot: client.log_artifact(run, str(plot)))
        if trainer.finished:
            self._put(lambda client, run: client.set_terminated(run, "FINISHED"))

    def close(self, trainer: Trainer) -> None:
        """Waits for the queue, but not for long."""
        if self._thread.is_alive():
            self._put(None)
            self._closing.set()
            self._thread.join(self._patience)
            if self._thread.is_alive():
                self._warn("what is still queued was given up")

    def _put_metrics(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._put([(n, v, now, step) for n, v in metrics.items() if math.isfinite(v)])

    def _put(self, item: Item) -> None:
        # Full only if MLflow has been stuck for long: then the figures are in the metrics log.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(item)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "MLflow at %s: %s. Training goes on; every figure is in %s",
                self._uri,
                why,
                self._output / "metrics.jsonl",
            )

    # Below: the background thread.

    def _work(self) -> None:
        opened: tuple[Any, str] | None = None
        resting_until = 0.0
        items: list[Item] = []
        while None not in items and not (self._closing.is_set() and self._queue.empty()):
            items = [self._queue.get()]
            # Many steps in one call: a call costs as much for one as for hundreds.
            self._closing.wait(_GATHER_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._queue.get_nowait())
            if time.monotonic() < resting_until:
                continue
            try:
                opened = opened or self._open()
                _deliver(*opened, items)
            except Exception as error:
                # Whatever MLflow, its store or the network raises: the run matters more.
                self._warn(f"{type(error).__name__}: {str(error).splitlines()[:1]}")
                resting_until = time.monotonic() + _RETRY_SECONDS

    def _open(self) -> tuple[Any, str]:
        """The client, and the id of the run: the one the output folder knows, or a new one."""
        # A server that is down is to be noticed within seconds; MLflow would try for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow.tracking import MlflowClient

        # After the import, which sets levels of its own.
        for chatty in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self._uri)
        run = self._continue(client) or self._create(client)
        self._trainer.tracking_run = run
        write_tracking(self._output, self._uri, run)
        return client, run

    def _continue(self, client: Any) -> str | None:
        if self._previous is None:
            return None
        from mlflow.exceptions import MlflowException

        try:
            client.update_run(self._previous, status="RUNNING")
        except MlflowException:
            logger.warning(
                "MLflow run %s is gone from %s; a new one begins", self._previous, self._uri
            )
            return None
        return self._previous

    def _create(self, client: Any) -> str:
        from mlflow.entities import Param

        tracking = self._config.tracking
        identifier = experiment_id(client, self._uri, tracking.experiment)
        tags = {} if tracking.parent_run is None else {_PARENT: tracking.parent_run}
        created = client.create_run(identifier, run_name=self._config.name, tags=tags)
        run: str = created.info.run_id
        values = to_flat(self._config).items()
        parameters = [Param(key, str(value)[:_VALUE_LENGTH]) for key, value in values]
        for first in range(0, len(parameters), _PARAMETERS_A_CALL):
            client.log_batch(run, params=parameters[first : first + _PARAMETERS_A_CALL])
        client.log_text(run, to_yaml(self._config), "run.yaml")
        return run


def experiment_id(client: Any, uri: str, name: str) -> str:
    """The experiment of that name in the client's store, made if there is none.

    With a local store the artifacts lie beside it, not in the current folder.
    """
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///")).resolve()
        location = (store.parent / "mlartifacts").as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _deliver(client: Any, run: str, items: list[Item]) -> None:
    """Sends measurements together, then does the rest in order; nothing here depends on the mix."""
    from mlflow.entities import Metric

    metrics = [Metric(*one) for item in items if isinstance(item, list) for one in item]
    for first in range(0, len(metrics), _METRICS_A_CALL):
        client.log_batch(run, metrics=metrics[first : first + _METRICS_A_CALL])
    for item in items:
        if callable(item):
            item(client, run)
