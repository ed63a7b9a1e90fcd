"""The journal: all that a run has for MLflow, one JSON object a line, only ever appended to.

Its place says what has been uploaded (`TrackingState.sent`), and a line that was uploaded twice is
the same line: MLflow takes a metric of equal key, step, time and value as the one it has. That is
why a step's figures are written once, with their time, and those of a step that is trained again
after a restart are not written: MLflow cannot take back what it was told.
"""

import contextlib
import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ttt_megatron.tracking.steps import StepSet

JOURNAL_FILE = "tracking.jsonl"

Record = dict[str, Any]

# Kinds of records, the value of "kind", with the other keys they have.
HEADER = "run"  # first of all, see `header.Header`
PARAMETERS = "parameters"  # values
TAGS = "tags"  # values
METRICS = "metrics"  # step, time (ms), values
TEXT = "text"  # path, text: an artifact
ARTIFACT = "artifact"  # file (of the run's folder, or absolute), folder (in the run's artifacts)
STATUS = "status"  # status, time (ms)
EVENT = "event"  # event, step, time (ms): for the dashboard alone
REWOUND = "rewound"  # an event: back to its step, whose followers come again


class Journal:
    """A run's journal, opened to append. What a killed writer left half written is cut off.

    Others may append to it meanwhile, as `ttt-megatron upload` does while the run trains.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: Counter[str] = Counter()
        self._steps: dict[str, StepSet] = {}
        self._end = 0
        path.touch()
        with self._locked() as file:
            self._catch_up(file)

    def append(self, records: Iterable[Record]) -> int:
        """Writes records, all or none, to the disk; returns how many were new.

        Metrics of steps that the journal has are left out, unless the run has gone back from them:
        what follows that is written apart. Raises OSError.
        """
        parts: list[list[Record]] = [[]]
        for record in records:
            if record["kind"] == EVENT and record["event"] == REWOUND:
                parts += [[record], []]
            else:
                parts[-1].append(record)
        return sum(map(self._append, parts))

    def _append(self, records: list[Record]) -> int:
        with self._locked() as file:
            end = self._catch_up(file)
            known: set[tuple[str, int]] = set()
            fresh = [new for record in records if (new := self._fresh(record, known)) is not None]
            if not fresh:
                return 0
            data = "".join(json.dumps(record) + "\n" for record in fresh).encode()
            try:
                file.seek(end)
                rest = memoryview(data)
                while rest:  # a full disk takes a part, and refuses the next
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
            self._end = end + len(data)
        for record in fresh:
            self._note(record)
        return len(fresh)

    def _catch_up(self, file: Any) -> int:
        """Takes note of what others have appended, cuts off half a line; where the journal ends.

        The file is locked.
        """
        size = file.seek(0, os.SEEK_END)
        if size <= self._end:  # less only if the file is another
            return size
        records, self._end = read_records(self.path, self._end)
        for record in records:
            self._note(record)
        if size > self._end:
            file.truncate(self._end)
        return self._end

    def _locked(self) -> Any:
        """The file, no other process of ours writing to it until it is closed."""
        file = self.path.open("r+b", buffering=0)
        # Where a file system has no locks, there is but one writer: the run's own.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _fresh(self, record: Record, known: set[tuple[str, int]]) -> Record | None:
        """The record without what the journal has, nor what is `known`; None if nothing is left."""
        if record["kind"] != METRICS:
            return record
        step = record["step"]
        values = {
            name: value
            for name, value in record["values"].items()
            if math.isfinite(value)
            and step not in self._steps.get(name, ())
            and (name, step) not in known
        }
        known |= {(name, step) for name in values}
        return {**record, "values": values} if values else None

    def _note(self, record: Record) -> None:
        if record["kind"] == EVENT:
            self.events[record["event"]] += 1
            if record["event"] == REWOUND:
                for steps in self._steps.values():
                    steps.cut(record["step"])
        if record["kind"] == METRICS:
            for name in record["values"]:
                self._steps.setdefault(name, StepSet()).add(record["step"])


def read_records(path: Path, start: int, limit: int | None = None) -> tuple[list[Record], int]:
    """Records of whole lines from byte `start` on, at most about `limit` bytes of them, and where
    the next begins. Lines that are no records are passed over."""
    if not path.exists():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read() if limit is None else file.read(limit)
        if limit is not None and data and not data.endswith(b"\n"):
            data += file.readline()
    data = data[: data.rfind(b"\n") + 1]
    records = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records, start + len(data)


def metrics_record(values: Mapping[str, float], step: int, time_ms: int) -> Record:
    """Figures of a step."""
    return {
        "kind": METRICS,
        "step": step,
        "time": time_ms,
        "values": {name: float(value) for name, value in values.items()},
    }
