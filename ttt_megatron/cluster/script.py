"""A job's script: the template in `slurm/` filled in for a profile."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from ttt_megatron.cluster.profile import FILES, Profile

TEMPLATE = "job.sbatch.j2"
LOG = "%j.log"
ARRAY_LOG = "%A_%a.log"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a script runs.

    about: lines of its heading; folder: of logs and notes, absolute; work: the folder in which it
    runs, absolute; command: what follows `train`, or a whole subcommand where `torchrun` is False;
    raw: words after it in which the shell replaces variables; outputs: the folders whose
    checkpoints tell progress, by index of an array's task (index 0 without an array); mounts:
    folders that a container needs besides.
    """

    name: str
    about: Sequence[str]
    folder: Path
    work: Path
    command: Sequence[str]
    python: str
    outputs: dict[int, Path]
    nodes: int = 1
    processes: int = 1
    on_gpu: bool = True
    torchrun: bool = True
    array: str | None = None
    raw: Sequence[str] = ()
    mounts: Sequence[Path] = field(default=())


def render(job: Job, profile: Profile) -> str:
    """The script's text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        # `{#` begins a length in bash.
        comment_start_string="<#",
        comment_end_string="#>",
    )
    environment.filters["q"] = shlex.quote
    template = environment.get_template(TEMPLATE)
    return template.render(
        about=[line.replace("\n", " ") for line in job.about],
        sbatch=list(_sbatch(job, profile)),
        srun=list(_srun(job, profile)),
        environment=list(_environment(job, profile).items()),
        command=_lines(job),
        outputs=[(index, str(path)) for index, path in job.outputs.items()],
        folder=str(job.folder),
        python=_python(job, profile),
        nodes=job.nodes,
        processes=job.processes,
        torchrun=job.torchrun,
        array=job.array,
        profile=profile,
    )


def _python(job: Job, profile: Profile) -> str:
    if profile.python is not None:
        return profile.python
    return "python" if profile.venv or profile.container else job.python


def _lines(job: Job) -> list[str]:
    """The command's words, each on a line, quoted."""
    return [*map(shlex.quote, job.command), *job.raw]


def _sbatch(job: Job, profile: Profile) -> list[str]:
    options: dict[str, object] = {
        "job-name": job.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "array": job.array,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": profile.cpus_per_task,
        "gpus-per-node": _gpus(job, profile),
        "mem": profile.memory,
        "time": profile.time_limit,
        # To this script alone, which passes it on.
        "signal": f"B:TERM@{profile.warning_seconds}",
        "chdir": job.work,
        "output": job.folder / (ARRAY_LOG if job.array else LOG),
        "open-mode": "append",
    }
    found = [f"--{key}={_in_heading(value)}" for key, value in options.items() if value is not None]
    return [*found, "--requeue", *profile.sbatch_options]


def _in_heading(value: object) -> str:
    """A value as sbatch reads it from a script: quotes keep what has spaces together."""
    text = str(value)
    return f'"{text}"' if any(mark in text for mark in " \t#'") else text


def _gpus(job: Job, profile: Profile) -> str | None:
    if not job.on_gpu or not profile.gpus_per_node:
        return None
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    return f"{kind}{job.processes}"


def _srun(job: Job, profile: Profile) -> list[str]:
    options = [f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--kill-on-bad-exit=1"]
    if profile.cpus_per_task is not None:
        # Newer versions of srun do not take it over from sbatch.
        options.append(f"--cpus-per-task={profile.cpus_per_task}")
    if job.nodes > 1:
        options.append("--label")
    if profile.container is not None:
        mounts = [f"{path}:{path}" for path in (job.work, *job.mounts)]
        options += [
            f"--container-image={profile.container.image}",
            f"--container-mounts={','.join([*mounts, *profile.container.mounts])}",
            f"--container-workdir={job.work}",
        ]
    return [*options, *profile.srun_options]


def _environment(job: Job, profile: Profile) -> dict[str, str]:
    # Lines come when they are written; and a run for the CPU must not see GPUs.
    values = {"PYTHONUNBUFFERED": "1", **({} if job.on_gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    return values | profile.environment
