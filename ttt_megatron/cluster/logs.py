"""A job's log: all of it, the last attempt, and what comes after."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from ttt_megatron.cluster.status import read_notes

_ATTEMPT = re.compile(rb"^\[job [\d_]+, attempt \d+, [^\]]*\] on ", re.MULTILINE)
_OVER = ("finished", "refused", "failed", "cancelled")
_POLL_SECONDS = 0.5


def last_attempt(log: bytes) -> bytes:
    """What a log holds from the beginning of the job's last attempt on."""
    starts = [found.start() for found in _ATTEMPT.finditer(log)]
    return log[starts[-1] :] if starts else log


def last_lines(log: bytes, number: int) -> bytes:
    """The last lines of a log."""
    return b"".join(log.splitlines(keepends=True)[-number:]) if number else b""


def follow(path: Path, start: int, folder: Path, task: str) -> Iterator[bytes]:
    """What is written to a log after its first `start` bytes, until its job has ended for good."""
    while True:
        over = read_notes(folder, task)[0] in _OVER
        with path.open("rb") as file:
            file.seek(start)
            found = file.read()
        if found:
            start += len(found)
            yield found
        elif over:
            return
        time.sleep(_POLL_SECONDS)
