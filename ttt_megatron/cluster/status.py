"""How far jobs are: what was submitted, what Slurm says of it, and what the run's folder holds."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_megatron.cluster.records import JobRecord
from ttt_megatron.cluster.slurm import QueuedJob, sacct, squeue
from ttt_megatron.errors import UserError
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS, newest_complete, read_info
from ttt_megatron.training.metrics_file import METRICS_FILE, last_row

_WORDS = {
    "finished": "finished",
    "refused": "refused: an error that would come again, see its log",
    "failed": "given up after fruitless attempts, see its log",
    "cancelled": "cancelled",
}


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job, or one task of an array.

    state: in words; attempt: 0 before the first; checkpoint: the newest complete one's step, 0 for
    none, and saved its age in seconds; step and loss: the last ones logged; left: seconds that the
    steps left take at the last one's rate, None if unknown.
    """

    job_id: str
    record: JobRecord
    state: str
    active: bool
    slurm: QueuedJob | None
    attempt: int
    checkpoint: int
    saved: float | None
    step: int
    loss: float | None
    left: float | None


def read_status(records: Sequence[JobRecord]) -> list[JobStatus]:
    """The status of every job, and of every task of arrays.

    Raises UserError where there is no Slurm.
    """
    if not records:
        return []
    queue = squeue(record.user for record in records)
    tasks = [(task, record) for record in records for task in task_folders(record)]
    ended = sorted({task.split("_")[0] for task, _ in tasks if task not in queue})
    return statuses(records, queue, sacct(ended))


def task_folders(record: JobRecord) -> dict[str, Path]:
    """The runs' folders by the job ids that Slurm gives them."""
    if not record.tasks:
        return {record.job_id: Path(record.output)}
    return {f"{record.job_id}_{index}": Path(path) for index, path in record.tasks.items()}


def statuses(
    records: Sequence[JobRecord], queue: Mapping[str, QueuedJob], ended: Mapping[str, QueuedJob]
) -> list[JobStatus]:
    """Joins records with what `squeue` and `sacct` say of them, and with the runs' folders."""
    return [
        _status(record, task, folder, queue.get(task) or ended.get(task))
        for record in records
        for task, folder in task_folders(record).items()
    ]


def _status(record: JobRecord, task: str, run: Path, slurm: QueuedJob | None) -> JobStatus:
    noted, attempt = read_notes(Path(record.folder), task)
    step, saved = _newest(run)
    row = last_row(run / METRICS_FILE, "loss")
    logged = step if row is None else max(step, int(row["step"]))
    active = slurm is not None and slurm.active
    seconds = None if row is None else row.get("seconds")
    return JobStatus(
        job_id=task,
        record=record,
        state=_in_words(slurm, noted, step),
        active=active,
        slurm=slurm,
        attempt=attempt,
        checkpoint=max(step, 0),
        saved=saved,
        step=max(logged, 0),
        loss=None if row is None else row["loss"],
        left=seconds * (record.steps - logged) if active and seconds is not None else None,
    )


def read_notes(folder: Path, task: str) -> tuple[str, int]:
    """How a job's script says that it stands, and its attempt; "" and 0 before it began."""
    try:
        _, _, word, attempt = (folder / f"{task}.state").read_text().split()
        return word, int(attempt)
    except (OSError, ValueError):
        return "", 0


def _newest(run: Path) -> tuple[int, float | None]:
    """The newest complete checkpoint's step and its age in seconds; -1 if all are damaged."""
    folder = run / CHECKPOINTS
    try:
        checkpoint = newest_complete(folder, quick=True) if folder.is_dir() else None
        if checkpoint is None:
            return 0, None
        return read_info(checkpoint).step, time.time() - checkpoint.stat().st_mtime
    except UserError:
        return -1, None


def _in_words(slurm: QueuedJob | None, noted: str, step: int) -> str:
    if slurm is None or not slurm.active:
        told = _WORDS.get(noted)
        if told is None and slurm is not None:
            reason = f" ({slurm.reason})" if slurm.reason else ""
            told = f"{slurm.state.lower()}{reason}"
        told = told or "not known to Slurm any more"
    elif slurm.state == "PENDING" and slurm.reason == "DependencyNeverSatisfied":
        told = "waiting for a job that failed: cancel it"
    elif slurm.state == "PENDING":
        told = f"waiting ({slurm.reason})" if slurm.reason else "waiting"
    else:
        left = f", {slurm.left} left" if slurm.left and slurm.state == "RUNNING" else ""
        told = f"{slurm.state.lower()}{left}"
    return told if step >= 0 else f"{told}; all checkpoints are damaged"


def as_json(status: JobStatus) -> dict[str, Any]:
    """A status as a JSON value."""
    record, slurm = status.record, status.slurm
    return {
        "job_id": status.job_id,
        "name": record.name,
        "recipe": record.recipe,
        "output": record.output,
        "state": status.state,
        "active": status.active,
        "slurm_state": None if slurm is None else slurm.state,
        "nodes": None if slurm is None else slurm.nodes,
        "attempt": status.attempt,
        "checkpoint": status.checkpoint,
        "checkpoint_age_seconds": status.saved,
        "step": status.step,
        "steps": record.steps,
        "loss": status.loss,
        "seconds_left": status.left,
        "after": record.after,
    }
