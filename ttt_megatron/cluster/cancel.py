"""Cancelling jobs with those that wait for them."""

from collections.abc import Mapping, Sequence
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

    A job or task that runs is asked to save and end by itself, unless `now`: then Slurm ends it
    after its usual notice. Raises UserError where there is no Slurm or it refuses.
    """
    queue = squeue(record.user for record in records)
    done = {}
    # Those that wait come first, so that none begins when the one before it is gone.
    for record in reversed(records):
        found = {task: queue[task] for task in task_folders(record) if task in queue}
        active = {task: job.state for task, job in found.items() if job.active}
        if not active:
            done[record.job_id] = "had ended already"
            continue
        # Its script, asked to end, would queue it again.
        mark = Path(record.folder) / f"{record.job_id}.cancelled"
        mark.touch()
        if now or "RUNNING" not in active.values():
            run_slurm(["scancel", record.job_id])
            done[record.job_id] = "cancelled"
        else:
            done[record.job_id] = _let_save(record.job_id, active)
    return dict(reversed(done.items()))


def _let_save(job: str, active: Mapping[str, str]) -> str:
    """Cancels the tasks of a job that do not run, given their states, and asks the others to save.

    Those that wait go first: otherwise they would take the places of those that end.
    """
    running = [task for task, state in active.items() if state == "RUNNING"]
    others = [task for task, state in active.items() if state not in ("RUNNING", "PENDING")]
    if "PENDING" in active.values():
        run_slurm(["scancel", "--state=PENDING", job])
    if others:
        run_slurm(["scancel", *others])
    # The whole job: one that began since is asked too.
    run_slurm(["scancel", "--batch", "--signal=TERM", job])
    if len(active) == 1:
        return "saves after its current step and ends"
    rest = len(active) - len(running)
    told = f"{len(running)} running tasks save after their current steps and end"
    return f"{told}, {rest} others cancelled" if rest else told
