"""Records of a journal into an MLflow run. What is delivered twice is there once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttt_megatron.tracking import journal
from ttt_megatron.tracking.journal import Record
from ttt_megatron.tracking.store import in_words

_METRICS_A_CALL = 1000
_VALUES_A_CALL = 100
_TAG_LENGTH = 5000
_PARAMETER_LENGTH = 6000
# What MLflow will not take at any time, as its errors name it.
_NEVER = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

Send = Callable[[], object]


@dataclass
class Delivered:
    """What did not arrive: refused for good, in words, and artifacts to try again another time."""

    refused: list[str] = field(default_factory=list)
    deferred: list[Record] = field(default_factory=list)


def deliver(client: Any, run: str, records: Sequence[Record], folder: Path) -> Delivered:
    """Sends records in order. Artifacts, whose store may be another, hold nothing else up.

    Raises whatever MLflow raises where trying again may help; what went before is then there.
    """
    outcome = Delivered()
    for send, parts in _calls(client, run, records, folder, outcome):
        _try(send, parts, outcome.refused)
    return outcome


def _try(send: Send, parts: Sequence[tuple[str, Send]], refused: list[str]) -> None:
    """All in one call, or, if the store refuses that, part by part."""
    try:
        send()
    except Exception as error:
        if getattr(error, "error_code", None) not in _NEVER:
            raise
        if len(parts) == 1:
            refused.append(f"{parts[0][0]} ({in_words(error)})")
            return
        for name, part in parts:
            _try(part, [(name, part)], refused)


def _calls(
    client: Any, run: str, records: Sequence[Record], folder: Path, outcome: Delivered
) -> Iterator[tuple[Send, list[tuple[str, Send]]]]:
    """Calls as large as MLflow takes them, and the parts of each, by name."""
    from mlflow.entities import Metric, Param, RunTag

    gathered: list[Any] = []

    def batches(key: str, values: list[Any], size: int) -> Iterator[Any]:
        def call(some: list[Any]) -> Send:
            return lambda: client.log_batch(run, **{key: some})

        for first in range(0, len(values), size):
            some = values[first : first + size]
            yield call(some), [(f"{key[:-1]} {one.key}", call([one])) for one in some]

    for record in records:
        kind = record["kind"]
        if kind == journal.METRICS:
            gathered += [
                Metric(name, value, record["time"], record["step"])
                for name, value in record["values"].items()
            ]
            continue
        yield from batches("metrics", gathered, _METRICS_A_CALL)
        gathered = []
        if kind == journal.PARAMETERS:
            parameters = [Param(k, str(v)[:_PARAMETER_LENGTH]) for k, v in record["values"].items()]
            yield from batches("params", parameters, _VALUES_A_CALL)
        elif kind == journal.TAGS:
            tags = [RunTag(k, str(v)[:_TAG_LENGTH]) for k, v in record["values"].items()]
            yield from batches("tags", tags, _VALUES_A_CALL)
        elif kind in (journal.TEXT, journal.ARTIFACT):
            _artifact(client, run, record, folder, outcome)
        elif kind == journal.STATUS:
            send = _status(client, run, record)
            yield send, [(kind, send)]
    yield from batches("metrics", gathered, _METRICS_A_CALL)


def _artifact(client: Any, run: str, record: Record, folder: Path, outcome: Delivered) -> None:
    try:
        if record["kind"] == journal.TEXT:
            client.log_text(run, record["text"], record["path"])
            return
        file = folder / record["file"]
        if file.is_file():
            client.log_artifact(run, str(file), record.get("folder"))
        else:
            outcome.refused.append(f"{file} (the file is gone)")
    except Exception as error:
        client.get_run(run)  # raises if it is the server that is away
        outcome.deferred.append({**record, "error": in_words(error)})


def _status(client: Any, run: str, record: Record) -> Send:
    if record["status"] == "RUNNING":
        return lambda: client.update_run(run, status="RUNNING")
    return lambda: client.set_terminated(run, record["status"], record["time"])
