"""What befell a run, one JSON object a line, from any of its processes."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ttt_megatron.errors import UserError

EVENTS_FILE = "events.jsonl"
ATTEMPT = "TTT_MEGATRON_ATTEMPT"
"""Environment variable: how often the run had been started again before this process."""
_ELASTIC = "TORCHELASTIC_RESTART_COUNT"
_ATTEMPTS = (ATTEMPT, _ELASTIC, "SLURM_RESTART_COUNT")

Kind = Literal[
    "started",
    "resumed",
    "damaged",
    "skipped",
    "spike",
    "rewound",
    "drift",
    "slow",
    "save failed",
    "hung",
    "failed",
    "restarting",
    "stopped",
    "finished",
]


def _attempt() -> int:
    return sum(int(os.environ.get(name, "0") or 0) for name in _ATTEMPTS)


def _own_rank() -> int | None:
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a person may want to know about a run afterwards.

    `time` in seconds since 1970; `step` outer steps done; `rank` None where a process is none of
    the ranks; `user` whether a failure is one that trying again does not cure.
    """

    kind: Kind
    message: str
    step: int | None = None
    user: bool = False
    rank: int | None = field(default_factory=_own_rank)
    attempt: int = field(default_factory=_attempt)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    time: float = field(default_factory=time.time)


def record_event(output: Path, event: Event) -> None:
    """Appends to `output/events.jsonl`, whole lines from any number of processes.

    A folder that cannot be written to loses the event: what is told must not depend on it.
    """
    line = (json.dumps(asdict(event)) + "\n").encode()
    with suppress(OSError):
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def read_events(output: Path) -> list[Event]:
    """A run's events in the order they were written; a line that was cut off is left out."""
    try:
        lines = (output / EVENTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError, TypeError):
            values: Mapping[str, Any] = json.loads(line)
            events.append(Event(**values))
    return events


@contextmanager
def recording_failure(output: Path) -> Iterator[None]:
    """Writes down the error that ends what is done within, and lets it pass."""
    try:
        yield
    except Exception as error:
        message = str(error) or type(error).__name__
        if not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}"
        record_event(
            output, Event(kind="failed", message=message, user=isinstance(error, UserError))
        )
        raise
