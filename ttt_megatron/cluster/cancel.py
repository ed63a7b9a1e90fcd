"""Cancelling jobs with those that wait for them."""

from collections.abc import Sequence
from pathlib import Path

from ttt_megatron.cluster.records import JobRecord
from ttt_megatron.cluster.slurm import run_slurm, squeue
from ttt_megatron.cluster.status import task_folders


def with_dependents(chosen: Sequence[JobRecord], known: Sequence[JobRecord]) -> list[JobRecord]:
    """The chosen jobs and, after them, all that wait for one of them, directly or not."""
    found = list(chosen)
    for record in found:  # which grows
        found += [other for other in known if record.job_id in other.after and other not in found]
    return found


def cancel_jobs(records: Sequence[JobRecord], *, now: bool) -> dict[str, str]:
    """Cancels what has not ended; by job, what was done.

    A job that runs is asked to save and end by itself, unless `now`: then Slurm ends it after its
    usual notice. Raises UserError where there is no Slurm or it refuses.
    """
    queue = squeue(record.user for record in records)
    done = {}
    # Those that wait come first, so that none begins when the one before it is gone.
    for record in reversed(records):
        tasks = [queue[task] for task in task_folders(record) if task in queue]
        active = [task for task in tasks if task.active]
        if not active:
            done[record.job_id] = "had ended already"
            continue
        # Its script, asked to end, would queue it again.
        mark = Path(record.folder) / f"{record.job_id}.cancelled"
        mark.touch()
        if now or any(task.state != "RUNNING" for task in active):
            run_slurm(["scancel", record.job_id])
            done[record.job_id] = "cancelled"
        else:
            run_slurm(["scancel", "--batch", "--signal=TERM", record.job_id])
            done[record.job_id] = "saves after its current step and ends"
    return dict(reversed(done.items()))
