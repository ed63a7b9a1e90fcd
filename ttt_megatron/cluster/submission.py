"""Stages of a training, checked, written as scripts and handed to Slurm one after the other."""

import getpass
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ttt_megatron
from ttt_megatron.cluster.layout import Placement, place
from ttt_megatron.cluster.mounts import needed_mounts
from ttt_megatron.cluster.profile import Profile
from ttt_megatron.cluster.records import FOLDER, JobRecord, add_record
from ttt_megatron.cluster.script import Job, render
from ttt_megatron.cluster.slurm import run_slurm, sbatch
from ttt_megatron.config import RunConfig
from ttt_megatron.errors import UserError

_INIT_FROM = "training.init_from"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A recipe to be trained by one job; `overrides` are those of the command and of a chain."""

    recipe: str
    overrides: list[str]
    placement: Placement

    @property
    def config(self) -> RunConfig:
        """The run."""
        return self.placement.config

    @property
    def output(self) -> Path:
        """The run's folder, absolute."""
        return Path(self.config.training.output).absolute()

    @property
    def folder(self) -> Path:
        """Where its scripts, logs and notes lie."""
        return self.output / FOLDER

    @property
    def settings(self) -> list[str]:
        """All overrides that `train` is given."""
        return [*self.placement.overrides, *self.overrides]


def make_stages(
    chain: Sequence[tuple[str, list[str]]], nodes: int | None, profile: Profile
) -> list[Stage]:
    """The stages of recipes with their overrides; each starts from the weights of the one before.

    Raises UserError for recipes that cannot run so, and for two that write to one folder.
    """
    stages: list[Stage] = []
    for recipe, overrides in chain:
        if stages:
            start = f"{_INIT_FROM}={stages[-1].config.training.output}"
            _refuse_start(recipe, overrides, start)
            overrides = [*overrides, start]
        stage = Stage(
            recipe=recipe,
            overrides=overrides,
            placement=place(recipe, overrides, nodes, profile),
        )
        _refuse_device(stage, profile)
        for other in stages:
            if other.output == stage.output:
                raise UserError(
                    f"{other.recipe} and {recipe} both write to training.output="
                    f"{stage.config.training.output}: give one of them another"
                )
        stages.append(stage)
    return stages


def _refuse_start(recipe: str, overrides: Sequence[str], start: str) -> None:
    for word in overrides:
        if word.startswith(f"{_INIT_FROM}=") and word != start:
            raise UserError(
                f"--then {recipe} {word}: a stage of a chain starts from the one before, {start}; "
                "leave it out, or submit the recipe alone with --after"
            )


def _refuse_device(stage: Stage, profile: Profile) -> None:
    if stage.config.training.device == "cuda" and not profile.gpus_per_node:
        raise UserError(
            f"{stage.recipe}: training.device = cuda, and the nodes of profile {profile.name} have "
            "no GPUs (gpus_per_node = 0): choose another --profile"
        )


def script_of(stage: Stage, profile: Profile) -> str:
    """The script's text."""
    config, work = stage.config, Path.cwd()
    parallel = config.parallel
    about = [
        f"{config.name}: {stage.recipe} {shlex.join(stage.overrides)}".rstrip(),
        f"{stage.placement.nodes} nodes of {stage.placement.processes} processes by profile "
        f"{profile.name}; tensor {parallel.tensor}, context {parallel.context}, pipeline "
        f"{parallel.pipeline}, data {parallel.data}, {stage.placement.origin}",
        f"Written by ttt-megatron {ttt_megatron.__version__} submit.",
    ]
    job = Job(
        name=config.name,
        about=about,
        folder=stage.folder,
        work=work,
        command=[stage.recipe, *stage.settings],
        python=sys.executable,
        outputs={0: stage.output},
        nodes=stage.placement.nodes,
        processes=stage.placement.processes,
        on_gpu=bool(profile.gpus_per_node) and config.training.device != "cpu",
        mounts=needed_mounts(work, [config], [Path(stage.recipe)]),
    )
    return render(job, profile)


def submit_stages(
    stages: Sequence[Stage], profile: Profile, after: Sequence[str]
) -> list[JobRecord]:
    """Writes and submits every stage's script, each to begin when the one before has succeeded.

    `after` are jobs that the first waits for. Each is recorded in `jobs.jsonl` beside its run's
    folder. If one is not accepted, those before are cancelled. Raises UserError.
    """
    records: list[JobRecord] = []
    for stage in stages:
        try:
            record = submit_script(
                script_of(stage, profile),
                folder=stage.folder,
                after=[records[-1].job_id] if records else list(after),
                record={
                    "name": stage.config.name,
                    "recipe": stage.recipe,
                    "overrides": stage.settings,
                    "output": str(stage.output),
                    "nodes": stage.placement.nodes,
                    "processes": stage.placement.processes,
                    "profile": profile.name,
                    "steps": stage.config.training.steps,
                },
            )
        except UserError:
            if records:
                run_slurm(["scancel", *(record.job_id for record in records)])
            raise
        add_record(stage.output.parent, record)
        records.append(record)
    return records


def submit_script(
    text: str, *, folder: Path, after: Sequence[str], record: dict[str, object]
) -> JobRecord:
    """Writes a script into `folder` and submits it; `record` is what else there is to record."""
    script = write_script(text, folder)
    identifier = sbatch(script, after)
    values: dict[str, object] = {
        "job_id": identifier,
        "script": str(script),
        "folder": str(folder),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": source_commit(),
        "user": getpass.getuser(),
        "after": [*after],
    }
    return JobRecord(**{**values, **record})  # type: ignore[arg-type]


def write_script(text: str, folder: Path) -> Path:
    """The script's file, under a name that no other has; Slurm does not make the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem, number = time.strftime("%Y%m%d-%H%M%S"), 0
        while True:
            path = folder / (f"{stem}-{number}.sbatch" if number else f"{stem}.sbatch")
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}): choose another training.output"
        ) from None


def source_commit() -> str:
    """The commit of this package's source, `-dirty` if it was changed since, else its version."""
    folder = Path(ttt_megatron.__file__).parent
    git = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ttt_megatron.__version__
    return found if re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found) else ttt_megatron.__version__


def submission_lines(stage: Stage, after: Sequence[str]) -> list[str]:
    """The commands by which a stage's script could be submitted by hand, for --dry-run."""
    words = ["sbatch"]
    if after:
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return [shlex.join(["mkdir", "-p", str(stage.folder)]), " ".join([*words, "SCRIPT"])]
