"""What a run has for MLflow, from its first step to its end."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_megatron.config import to_yaml
from ttt_megatron.config.convert import to_flat
from ttt_megatron.config.schema import RunConfig
from ttt_megatron.tracking import journal
from ttt_megatron.tracking.complete import rows_as_records
from ttt_megatron.tracking.header import new_header, read_header, to_record
from ttt_megatron.tracking.journal import JOURNAL_FILE, Journal, Record, metrics_record
from ttt_megatron.tracking.recorder import Recorder, now_ms
from ttt_megatron.tracking.run_tags import run_tags
from ttt_megatron.tracking.state import read_state
from ttt_megatron.tracking.store import tracking_uri
from ttt_megatron.tracking.upload_thread import UploadThread
from ttt_megatron.tracking.uploader import Uploader
from ttt_megatron.training.callbacks.base import Callback
from ttt_megatron.training.lineage import lineage_of_start
from ttt_megatron.training.metrics_file import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from ttt_megatron.resilience.events import Event
    from ttt_megatron.training.records import StepRecord
    from ttt_megatron.training.trainer import Trainer

logger = logging.getLogger(__name__)

_WRITE_SECONDS = 10.0
_CLOSE_SECONDS = 30.0
_STARTED, _RESUMED, _SAVED = "started", "resumed", "saved"
_ARTIFACTS = ("*.png", "dashboard.html")


class MlflowTracking(Callback):
    """Keeps the journal of one MLflow run, which a resumed training continues, and uploads it
    meanwhile unless tracking.offline; for the main rank. Nothing that fails here ends a run."""

    def __init__(self, config: RunConfig, *, stopping_patience: float = _CLOSE_SECONDS) -> None:
        """`stopping_patience`: seconds to wait at the end for what is still to upload."""
        self._config = config
        self._output = Path(config.training.output)
        self._patience = stopping_patience
        self._uploader = Uploader(self._output, tracking_uri(config.tracking, self._output))
        self._recorder: Recorder | None = None
        self._thread: UploadThread | None = None
        self._ended = False

    def on_start(self, trainer: Trainer) -> None:
        """Opens the journal, completes it up to where the run stands, and starts the threads."""
        grown = threading.Event()
        path = self._output / JOURNAL_FILE
        try:
            written = Journal(path)
            records = self._first_records(written, trainer)
            self._recorder = Recorder(written, grown)
        except (OSError, TypeError, KeyError) as error:
            logger.warning("%s: %s; this run is not logged to MLflow", path, error)
            return
        # In one go: a long run's are more than the queue takes.
        self._recorder.put(lambda: records)
        self._recorder.put(lambda: [_tags({**run_tags(self._config), **trainer.implementations})])
        if not self._config.tracking.offline:
            self._thread = UploadThread(self._uploader, grown, path)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Takes the step's figures."""
        trainer.tracking_run = self._uploader.run_id
        self._put(metrics_record(record.metrics(), record.step, now_ms()))

    def on_evaluation(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """Takes an evaluation's results."""
        self._put(metrics_record(metrics, step, now_ms()))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """Takes the newest checkpoint's path."""
        # Not the trainer's step, which is a later one where saves take place beside the training.
        self._put(_event(_SAVED, int(path.name.rpartition("-")[2])))
        self._put(_tags({"checkpoint": str(path.resolve())}))

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Takes the newest of what befell the run."""
        words = f"{event.kind} after step {event.step}: {event.message}"
        self._put(_tags({"last event": words}))

    def on_rewind(self, trainer: Trainer) -> None:
        """The steps that follow are other ones, though they have the same numbers."""
        self._put(_event(journal.REWOUND, trainer.progress.step))

    def on_end(self, trainer: Trainer) -> None:
        """Takes the plots, and how the run ended for now."""
        self._ended = True
        for pattern in _ARTIFACTS:
            for file in sorted(self._output.glob(pattern)):
                self._put({"kind": journal.ARTIFACT, "file": file.name})
        self._put(_status("FINISHED" if trainer.finished else "KILLED"))

    def close(self, trainer: Trainer) -> None:
        """Waits for what is still to write and to upload, but not for long, and tells the rest."""
        if self._recorder is None:
            return
        if not self._ended:
            self._put(_status("FAILED"))
        self._recorder.close(_WRITE_SECONDS)
        if self._thread is not None:
            self._thread.close(self._patience)
        trainer.tracking_run = self._uploader.run_id
        try:
            left = self._uploader.left()
        except OSError as error:
            logger.warning("%s cannot be read (%s)", self._output / JOURNAL_FILE, error)
            return
        if left.records:
            logger.warning("MLflow: %s still to upload: ttt-megatron upload %s", left, self._output)

    def _put(self, record: Record) -> None:
        if self._recorder is not None:
            self._recorder.put(record)

    def _first_records(self, written: Journal, trainer: Trainer) -> list[Record]:
        """What a journal lacks when its run begins or goes on."""
        header, step = read_header(written.path), trainer.progress.step
        records: list[Record] = []
        restarts = written.events[_STARTED] + written.events[_RESUMED]
        if header is None:
            header = new_header(self._config, lineage_of_start(self._config))
            records += [to_record(header), *settings_records(self._config)]
        else:
            records.append(settings_text(self._config))
        trainer.lineage = header.lineage
        trainer.tracking_run = self._uploader.run_id
        state = read_state(self._output)
        if state is None or state.sent is not None:  # else all was logged, without a journal
            records += rows_as_records(read_metrics(self._output / METRICS_FILE), now_ms())
        records.append(_event(_RESUMED if step else _STARTED, step))
        records.append(_tags({"restarts": str(restarts)}))
        return [*records, _status("RUNNING")]


def settings_records(config: RunConfig) -> list[Record]:
    """A run's settings, as parameters and as a recipe."""
    return [
        {"kind": journal.PARAMETERS, "values": {k: str(v) for k, v in to_flat(config).items()}},
        settings_text(config),
    ]


def settings_text(config: RunConfig) -> Record:
    """The settings as a recipe; unlike parameters, MLflow lets it be replaced."""
    return {"kind": journal.TEXT, "path": "run.yaml", "text": to_yaml(config)}


def _tags(values: dict[str, str]) -> Record:
    return {"kind": journal.TAGS, "values": values}


def _status(status: str) -> Record:
    return {"kind": journal.STATUS, "status": status, "time": now_ms()}


def _event(event: str, step: int) -> Record:
    return {"kind": journal.EVENT, "event": event, "step": step, "time": now_ms()}
