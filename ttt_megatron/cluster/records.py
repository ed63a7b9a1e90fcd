"""The jobs of an output root: `jobs.jsonl`, a line for each, in the order of their submission."""

import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.errors import UserError

JOBS_FILE = "jobs.jsonl"
FOLDER = "slurm"
"""Where scripts, logs and notes of a run's jobs lie, in its output folder."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A submitted job. Paths are absolute; `after` are the jobs it waits for.

    tasks: of an array, the folder of every task's run by its index; else empty.
    """

    job_id: str
    name: str
    recipe: str
    overrides: list[str]
    output: str
    script: str
    folder: str
    time: str
    nodes: int
    processes: int
    profile: str
    commit: str
    user: str
    after: list[str]
    steps: int
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The log, of a job that is no array."""
        return Path(self.folder) / f"{self.job_id}.log"


def add_record(root: Path, record: JobRecord) -> None:
    """Appends a line; several processes may do so at once."""
    root.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dataclasses.asdict(record)) + "\n"
    descriptor = os.open(root / JOBS_FILE, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_records(root: Path) -> list[JobRecord]:
    """All jobs of a root, oldest first; none if nothing was submitted there.

    Raises UserError for a line that is no job's.
    """
    path = root / JOBS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]


def _record(line: str, source: str) -> JobRecord:
    try:
        values: dict[str, Any] = json.loads(line)
        return JobRecord(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source} tells of no job ({error}): remove it") from None


def find_record(root: Path, word: str) -> JobRecord:
    """The newest job that a number, a run's name or its folder names.

    Raises UserError if there is none.
    """
    records = read_records(root)
    for record in reversed(records):
        if word in (record.job_id, record.name) or Path(word).absolute() == Path(record.output):
            return record
    known = ", ".join(f"{record.job_id} ({record.name})" for record in records[-5:])
    raise UserError(
        f"{word}: {root / JOBS_FILE} has no such job"
        + (f"; the last are {known}" if known else "; --root names the folder of another")
    )
