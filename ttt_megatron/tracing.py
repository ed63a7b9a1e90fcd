"""Named spans of time, written as a Chrome/Perfetto trace: one file a process.

`span` costs next to nothing while no trace is being recorded.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Trace:
    """What one process recorded, in wall-clock time: processes can be laid side by side."""

    rank: int
    events: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """Append a span."""
        self.events.append(
            {
                "name": name,
                "ph": "X",
                "pid": self.rank,
                "tid": threading.get_native_id(),
                "ts": start_ns / 1000,
                "dur": (end_ns - start_ns) / 1000,
            }
        )

    def write(self, path: Path) -> None:
        """Write the trace, whole or not at all."""
        title = {"name": "process_name", "ph": "M", "pid": self.rank}
        events = [{**title, "args": {"name": f"rank {self.rank}"}}, *self.events]
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        beside.rename(path)


_current: Trace | None = None


def start_trace(rank: int) -> Trace:
    """Record this process's spans from now on."""
    global _current
    _current = Trace(rank)
    return _current


def stop_trace() -> None:
    """Record no longer."""
    global _current
    _current = None


def until_backward_ends(name: str) -> None:
    """Within a backward pass: record the time from here to the end of the whole pass."""
    trace = _current
    if trace is not None:
        start = time.time_ns()
        engine: Any = vars(torch.autograd.Variable)["_execution_engine"]
        engine.queue_callback(lambda: trace.add(name, start, time.time_ns()))


@contextmanager
def span(name: str) -> Iterator[None]:
    """Record the time spent within, under this name."""
    trace = _current
    if trace is None:
        yield
        return
    start = time.time_ns()
    try:
        yield
    finally:
        trace.add(name, start, time.time_ns())
