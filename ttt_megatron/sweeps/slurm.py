"""A sweep as an array of a Slurm cluster's tasks, one a point, on one node each."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ttt_megatron.cluster.mounts import needed_mounts
from ttt_megatron.cluster.profile import Profile
from ttt_megatron.cluster.records import FOLDER, JobRecord, add_record
from ttt_megatron.cluster.script import Job, render
from ttt_megatron.cluster.submission import submit_script
from ttt_megatron.errors import UserError
from ttt_megatron.sweeps.points import Point
from ttt_megatron.sweeps.spec import Sweep


def array_script(
    sweep: Sweep,
    points: Sequence[Point],
    output: Path,
    jobs: int | None,
    overrides: Sequence[str],
    profile: Profile,
) -> str:
    """The script of an array over the chosen points, at most `jobs` at once.

    A task runs its point by `sweep --only-index`, in the folder that is current now.

    Raises UserError for points that need more than a node of the profile.
    """
    processes = max(point.config.parallel.world_size for point in points)
    if processes > profile.processes:
        raise UserError(
            f"{sweep.source}: a point takes {processes} processes, and a node of profile "
            f"{profile.name} has {profile.processes}: a task of a sweep is one node; submit the "
            "recipe by itself for more"
        )
    work = Path.cwd()
    mounts = needed_mounts(
        work,
        [point.config for point in points],
        [sweep.base],
        [Path(sweep.source), output / FOLDER],
    )
    job = Job(
        name=sweep.name,
        about=[f"The sweep {sweep.source}: {len(points)} points, by profile {profile.name}"],
        folder=output.absolute() / FOLDER,
        work=work,
        command=[
            *("sweep", os.path.abspath(sweep.source), "--output", str(output.absolute())),
            *(*overrides, "--only-index"),
        ],
        raw=['"$SLURM_ARRAY_TASK_ID"'],
        python=sys.executable,
        outputs={point.index: point.folder.absolute() for point in points},
        processes=processes,
        on_gpu=bool(profile.gpus_per_node)
        and any(point.config.training.device != "cpu" for point in points),
        torchrun=False,
        mounts=mounts,
        array=_ranges([point.index for point in points]) + (f"%{jobs}" if jobs else ""),
    )
    return render(job, profile)


def submit_array(
    text: str, sweep: Sweep, points: Sequence[Point], output: Path, profile: Profile
) -> JobRecord:
    """Submits the script of an array and records it in the sweep's folder. Raises UserError."""
    record = submit_script(
        text,
        folder=output.absolute() / FOLDER,
        after=[],
        record={
            "name": sweep.name,
            "recipe": sweep.source,
            "overrides": [],
            "output": str(output.absolute()),
            "nodes": 1,
            "processes": max(point.config.parallel.world_size for point in points),
            "profile": profile.name,
            "steps": max(point.config.training.steps for point in points),
            "tasks": {str(point.index): str(point.folder.absolute()) for point in points},
        },
    )
    add_record(output, record)
    return record


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as Slurm writes them: 0-3,5."""
    words: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for place, number in enumerate(ordered):
        if place + 1 == len(ordered) or ordered[place + 1] != number + 1:
            first = ordered[start]
            words.append(str(number) if first == number else f"{first}-{number}")
            start = place + 1
    return ",".join(words)
