"""A job's log: all of it, the last attempt, and what comes after."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from ttt_megatron.cluster.records import JobRecord
from ttt_megatron.cluster.slurm import sacct, squeue
from ttt_megatron.cluster.status import read_notes
from ttt_megatron.errors import UserError

_ATTEMPT = re.compile(rb"^\[job [\d_]+, attempt \d+, [^\]]*\] on ", re.MULTILINE)
_OVER = ("finished", "refused", "failed", "cancelled")
_POLL_SECONDS = 0.5
_ASK_SECONDS = 30.0


def last_attempt(log: bytes) -> bytes:
    """What a log holds from the beginning of the job's last attempt on."""
    starts = [found.start() for found in _ATTEMPT.finditer(log)]
    return log[starts[-1] :] if starts else log


def last_lines(log: bytes, number: int) -> bytes:
    """The last lines of a log."""
    return b"".join(log.splitlines(keepends=True)[-number:]) if number else b""


def follow(path: Path, start: int, record: JobRecord, task: str) -> Iterator[bytes]:
    """What is written to a log after its first `start` bytes, until its job has ended for good.

    That its script has taken note of, or that Slurm tells, which is asked while nothing comes: a
    script that Slurm ended could not take note of it.
    """
    over, asked = False, time.monotonic()
    while True:
        over = over or read_notes(Path(record.folder), task)[0] in _OVER
        if not over and time.monotonic() > asked + _ASK_SECONDS:
            over, asked = _has_ended(record, task), time.monotonic()
        with path.open("rb") as file:
            file.seek(start)
            found = file.read()
        if found:
            start += len(found)
            asked = time.monotonic()
            yield found
        elif over:
            return
        time.sleep(_POLL_SECONDS)


def _has_ended(record: JobRecord, task: str) -> bool:
    """Whether Slurm says that a job, or a task of an array, has ended or does not know it."""
    try:
        found = squeue([record.user]).get(task) or sacct([task]).get(task)
    except UserError:  # no Slurm here, or it does not answer
        return False
    return found is None or not found.active
