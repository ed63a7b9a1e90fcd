"""A sweep as an array of a batch system's tasks, one a point."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ttt_megatron.sweeps.job import LOGS, PROGRAM
from ttt_megatron.sweeps.points import Point
from ttt_megatron.sweeps.spec import Sweep

SCRIPT = "sweep.sbatch"
# Seconds before the time limit at which runs are asked to save and end.
_NOTICE = 120


def write_array(
    sweep: Sweep, points: Sequence[Point], output: Path, jobs: int | None, overrides: Sequence[str]
) -> Path:
    """Writes the script of an array over the chosen points, at most `jobs` at once; its path.

    A task runs its point by `sweep --only-index`, in the folder that is current now.
    """
    config = points[0].config
    processes = max(point.config.parallel.world_size for point in points)
    settings = [
        f"--job-name={sweep.name}",
        f"--array={_ranges([point.index for point in points])}" + (f"%{jobs}" if jobs else ""),
        f"--output={output.resolve() / LOGS}/slurm-%A_%a.log",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={processes}",
        *([] if config.training.device == "cpu" else [f"--gpus-per-node={processes}"]),
        f"--signal=B:TERM@{_NOTICE}",
        "--requeue",
    ]
    command = [
        *(*PROGRAM, "sweep", str(Path(sweep.source).resolve())),
        *("--output", str(output.resolve()), *overrides),
    ]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {setting}" for setting in settings),
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        # In the shell's place, so that the notice before the limit reaches it.
        f'exec {shlex.join(command)} --only-index "$SLURM_ARRAY_TASK_ID"',
    ]
    (output / LOGS).mkdir(parents=True, exist_ok=True)
    script = output / SCRIPT
    beside = script.with_name(f".{SCRIPT}.tmp")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.chmod(beside, 0o755)
    beside.replace(script)
    return script


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
