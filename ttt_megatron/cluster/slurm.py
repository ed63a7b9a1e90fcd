"""Slurm's commands, and what they print."""

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_megatron.errors import UserError

ACTIVE = frozenset(
    {
        *("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "RESIZING"),
        *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "STAGE_OUT", "SIGNALING"),
    }
)
"""States of a job that has not ended."""
_SQUEUE = "%i|%T|%r|%M|%L|%N"
_SACCT = "JobID,State,ExitCode,Elapsed"


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job, or a task of an array, as Slurm tells of it.

    state: as PENDING, RUNNING, COMPLETED; reason: why it waits or ended; elapsed and left: of this
    attempt, as Slurm writes times; nodes: names.
    """

    state: str
    reason: str = ""
    elapsed: str = ""
    left: str = ""
    nodes: str = ""

    @property
    def active(self) -> bool:
        """Whether it has not ended."""
        return self.state in ACTIVE


def run_slurm(command: Sequence[str]) -> str:
    """A command's output. Raises UserError if there is no such command here, or it fails."""
    try:
        done = subprocess.run(
            list(command), check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine: do it on a login node of a Slurm cluster"
            + (", or look at the script with --dry-run" if command[0] == "sbatch" else "")
        ) from None
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"{command[0]} failed (exit status {done.returncode}): {' / '.join(told)}")
    return done.stdout


def sbatch(script: Path, after: Sequence[str] = ()) -> str:
    """Submits a script, to begin when the jobs `after` have succeeded; the job's id."""
    words = ["sbatch", "--parsable"]
    if after:
        # If one of them fails it would wait for ever.
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    # A federation adds the cluster's name.
    return run_slurm([*words, str(script)]).strip().split(";")[0]


def squeue(users: Iterable[str]) -> dict[str, QueuedJob]:
    """Users' jobs that wait, run, or ended some minutes ago; an array's tasks one by one."""
    names = ",".join(sorted(set(users)))
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={names}"]
    return parse_squeue(run_slurm([*command, f"--format={_SQUEUE}"]))


def parse_squeue(text: str) -> dict[str, QueuedJob]:
    """What `squeue` prints, by job id, which is ID_INDEX for a task of an array."""
    jobs = {}
    for line in text.splitlines():
        identifier, state, reason, elapsed, left, nodes = line.split("|", 5)
        jobs[identifier] = QueuedJob(
            state=state,
            reason="" if reason == "None" else reason,
            elapsed=elapsed,
            left=left,
            nodes=nodes,
        )
    return jobs


def sacct(identifiers: Sequence[str]) -> dict[str, QueuedJob]:
    """What Slurm's accounting remembers of jobs; nothing where a cluster keeps no accounts."""
    if not identifiers:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations"]
    try:
        return parse_sacct(
            run_slurm([*command, f"--jobs={','.join(identifiers)}", f"--format={_SACCT}"])
        )
    except UserError:
        return {}


def parse_sacct(text: str) -> dict[str, QueuedJob]:
    """What `sacct` prints, by job id; of a job that was queued again, the last time counts."""
    jobs = {}
    for line in text.splitlines():
        identifier, state, exit_code, elapsed = line.split("|")
        status, _, number = exit_code.partition(":")
        reason = f"signal {number}" if number != "0" else f"exit status {status}"
        # "CANCELLED by 0" names the user.
        word = re.split(r"[ +]", state)[0]
        jobs[identifier] = QueuedJob(
            state=word, reason="" if word == "COMPLETED" else reason, elapsed=elapsed
        )
    return jobs
