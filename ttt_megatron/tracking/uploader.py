"""From a run's journal into its MLflow run, going on where the last upload ended."""

import fcntl
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from ttt_megatron.errors import UserError
from ttt_megatron.tracking.deliver import Delivered, deliver
from ttt_megatron.tracking.family import KEY, PARENT, find_run, join_family, settle_parent
from ttt_megatron.tracking.header import Header, read_header
from ttt_megatron.tracking.journal import JOURNAL_FILE, METRICS, STATUS, read_records
from ttt_megatron.tracking.state import TrackingState, read_state, write_state
from ttt_megatron.tracking.store import experiment_id, open_client

logger = logging.getLogger(__name__)

_LOCK_FILE = ".upload-lock"
_LARGEST_PIECE = 1 << 20
_SMALLEST_PIECE = 1 << 12
_GONE = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True, kw_only=True)
class Left:
    """What is still to upload: records, and the steps of the metrics among them."""

    records: int
    steps: tuple[int, int] | None

    def __str__(self) -> str:
        text = f"{self.records:,} record{'s' * (self.records != 1)}"
        return (
            text if self.steps is None else f"{text}, of steps {self.steps[0]} to {self.steps[1]}"
        )


class Uploader:
    """Uploads one run's journal to one store; for one process at a time."""

    def __init__(self, output: Path, uri: str) -> None:
        self.uri = uri
        self._output = output
        self._journal = output / JOURNAL_FILE
        self._piece = _LARGEST_PIECE
        self._client: Any = None
        self._experiment = ""
        self._parent: str | None = None
        self._lock: TextIO | None = None
        state = read_state(output)
        self._state = state if state is not None and state.uri == self.uri else None

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run, as soon as it is known."""
        return None if self._state is None else self._state.run_id

    def left(self) -> Left:
        """What the store has not got yet."""
        sent = 0 if self._state is None else self._state.sent or 0
        records, _ = read_records(self._journal, sent)
        steps = [record["step"] for record in records if record["kind"] == METRICS]
        deferred = 0 if self._state is None else len(self._state.deferred)
        return Left(
            records=len(records) + deferred, steps=(min(steps), max(steps)) if steps else None
        )

    def upload_piece(self) -> bool:
        """Sends the journal's next records, if there are any; whether there were.

        Raises whatever MLflow raises; the same records are then sent again.
        """
        if not self._journal.exists() or not self._journal.stat().st_size:
            return False  # the run has only just begun
        try:
            state = self._opened()
            start = state.sent or 0
            records, stop = read_records(self._journal, start, self._piece)
            if stop == start:
                return False
            outcome = deliver(self._client, state.run_id, records, self._output)
            if outcome.refused and _is_gone(self._client, state.run_id):
                self._client = None
                return self.upload_piece()
            if self._parent and any(record["kind"] == STATUS for record in records):
                settle_parent(self._client, self._experiment, self._parent)
        except Exception:
            # Perhaps it was too much for the time that a request has.
            self._client = None
            self._piece = max(_SMALLEST_PIECE, self._piece // 4)
            raise
        self._told(outcome)
        deferred = (*state.deferred, *outcome.deferred)
        self._keep(replace(state, sent=stop, deferred=deferred))
        self._piece = min(_LARGEST_PIECE, self._piece * 2)
        return True

    def upload_deferred(self) -> None:
        """Tries artifacts again whose store did not take them. Raises as `upload_piece` does."""
        state = self._opened()
        if state.deferred:
            outcome = deliver(self._client, state.run_id, state.deferred, self._output)
            self._told(outcome)
            self._keep(replace(state, deferred=tuple(outcome.deferred)))

    def close(self) -> None:
        """Lets another process upload."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _told(self, outcome: Delivered) -> None:
        for what in outcome.refused:
            logger.warning("MLflow at %s refuses %s", self.uri, what)
        for record in outcome.deferred:
            name = record.get("file") or record.get("path")
            logger.warning(
                "MLflow at %s did not take the artifact %s (%s); the next upload tries again",
                self.uri,
                name,
                record["error"],
            )

    def _keep(self, state: TrackingState) -> None:
        write_state(self._output, state)
        self._state = state

    def _opened(self) -> TrackingState:
        """With a client, and the run: the known one, the one of the journal's key, or a new one."""
        if self._client is not None and self._state is not None:
            return self._state
        self._take_lock()
        header = read_header(self._journal)
        if header is None:
            raise UserError(f"{self._journal} does not begin as a journal does: remove it")
        client = open_client(self.uri)
        self._experiment = experiment_id(client, self.uri, header.experiment)
        state = self._state
        if state is not None and _is_gone(client, state.run_id):
            logger.warning("MLflow run %s is gone from %s", state.run_id, self.uri)
            state = None
        if state is None:
            run = self._found_or_made(client, header)
            state = TrackingState(uri=self.uri, run_id=run, sent=0)
        elif state.sent is None:
            state = replace(state, sent=0)
            client.set_tag(state.run_id, KEY, header.key)
        self._keep(state)
        self._parent = join_family(client, self._experiment, state.run_id, header)
        # Last of all: what failed on the way here is done again.
        self._client = client
        return state

    def _take_lock(self) -> None:
        """One process uploads a run's journal, or its place in it would be lost."""
        if self._lock is not None:
            return
        file = (self._output / _LOCK_FILE).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"another process, perhaps its training, uploads {self._output} now: wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._lock = file

    def _found_or_made(self, client: Any, header: Header) -> str:
        # Made before, by a process that was killed before it heard of it.
        found = find_run(client, self._experiment, header.key)
        if found is not None:
            return str(found.info.run_id)
        tags = {KEY: header.key}
        if header.parent_run is not None:
            tags[PARENT] = header.parent_run
        made = client.create_run(
            self._experiment, start_time=header.time, run_name=header.name, tags=tags
        )
        return str(made.info.run_id)


def _is_gone(client: Any, run: str) -> bool:
    """Whether the store says that there is no such run; not whether it cannot be asked."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run).info.lifecycle_stage != "active")
    except MlflowException as error:
        if error.error_code == _GONE:
            return True
        raise
