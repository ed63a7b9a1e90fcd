"""What a cluster asks of every job: partition, GPUs, limits, environment. One YAML file each."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttt_megatron.cluster.profile_values import check_fields, refuse_unknown
from ttt_megatron.config.setting import setting
from ttt_megatron.config.yaml_text import parse_yaml
from ttt_megatron.errors import UserError

FILES = Path(__file__).parent / "files"
"""The project's folder `slurm/`: the template of scripts, and profiles."""
DEFAULT = "default"
VARIABLE = "TTT_MEGATRON_PROFILE"


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image that Pyxis and Enroot run the training in."""

    image: str = setting("", "A squashfs file, or registry#image:tag.")
    mounts: list[str] = field(
        default_factory=list,
        metadata={"help": "/host/path:/path/inside, beside the folder from which is submitted."},
    )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A cluster, as one kind of job uses it. None leaves a choice to Slurm."""

    name: str = setting("", "Set to the file's name.")
    partition: str | None = setting(None, "Slurm's --partition.")
    account: str | None = setting(None, "Slurm's --account.")
    qos: str | None = setting(None, "Slurm's --qos.")
    gpu: str = setting("h100", "Kind of GPU for which layouts are planned (`ttt-megatron plan`).")
    gpu_type: str | None = setting(None, "Name of the GPUs in Slurm, as in --gpus-per-node=NAME:8.")
    gpus_per_node: int = setting(8, "GPUs of a node; 0 for nodes without.")
    processes_per_node: int | None = setting(None, "Processes a node; None is one a GPU.")
    cpus_per_task: int | None = setting(None, "CPUs of a node for all its processes.")
    memory: str | None = setting(None, "Slurm's --mem, of a node; 0 is all.")
    time_limit: str = setting("24:00:00", "After which the job saves and queues itself again.")
    warning_seconds: int = setting(300, "Seconds before the time limit at which it saves.")
    python: str | None = setting(None, "Interpreter; None is the venv's, else that of `submit`.")
    venv: str | None = setting(None, "Virtual environment that is activated.")
    modules: list[str] = field(
        default_factory=list, metadata={"help": "Loaded by `module load`, in order."}
    )
    container: Container | None = field(
        default=None, metadata={"help": "Image that the training runs in."}
    )
    environment: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Variables of all processes."}
    )
    sbatch_options: list[str] = field(
        default_factory=list, metadata={"help": "Further options of sbatch."}
    )
    srun_options: list[str] = field(
        default_factory=list, metadata={"help": "Further options of srun."}
    )
    max_restarts: int = setting(3, "Restarts by torchrun within a job, on the same nodes.")
    max_fruitless_requeues: int = setting(
        3, "Times a job is queued again without a new checkpoint in between."
    )
    backoff_seconds: int = setting(
        30, "Wait before a job without a new checkpoint is queued again; doubles each time."
    )

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return self.processes_per_node or self.gpus_per_node


def load_profile(name: str | None = None) -> Profile:
    """A profile by its file's path, or by name: of `slurm/profiles` here, else of this package.

    None takes the variable TTT_MEGATRON_PROFILE, else `default`.

    Raises UserError for a file that cannot be read, unknown keys (naming the nearest), and values
    of the wrong type or that cannot be.
    """
    path = _find(name or os.environ.get(VARIABLE) or DEFAULT)
    source = str(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the profile cannot be read ({error})") from None
    return profile_from(data or {}, path.stem, source)


def profile_from(data: Any, name: str, source: str) -> Profile:
    """The profile that `data` describes; UserError as `load_profile` raises it."""
    if not isinstance(data, dict):
        raise UserError(f"{source}: a profile holds `key: value` pairs, not {data!r}")
    values = dict(data)
    refuse_unknown(values, _names(Profile), source)
    if values.get("container") is not None:
        inner = values["container"]
        if not isinstance(inner, dict) or not inner.get("image"):
            raise UserError(
                f"{source}: container must hold an image, and mounts if any, not {inner!r}"
            )
        refuse_unknown(inner, _names(Container), f"{source}: container", prefix="container.")
        values["container"] = Container(
            **check_fields(Container, inner, source, prefix="container.")
        )
    profile = Profile(**{**check_fields(Profile, values, source), "name": name})
    _refuse_impossible(profile, source)
    return profile


def _names(cls: type) -> list[str]:
    return [item.name for item in dataclasses.fields(cls) if item.name != "name"]


def _find(name: str) -> Path:
    if "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name)
    folders = (Path("slurm") / "profiles", FILES / "profiles")
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(
        f"--profile {name}: there is no such profile; give the path of a YAML file, or one of "
        f"{', '.join(known)}"
    )


def _refuse_impossible(profile: Profile, source: str) -> None:
    for key, least in (
        ("gpus_per_node", 0),
        ("processes_per_node", 1),
        ("cpus_per_task", 1),
        ("warning_seconds", 1),
        ("max_restarts", 0),
        ("max_fruitless_requeues", 0),
        ("backoff_seconds", 0),
    ):
        value = getattr(profile, key)
        if value is not None and value < least:
            raise UserError(f"{source}: {key} = {value} must be at least {least}")
    if not profile.processes:
        raise UserError(
            f"{source}: gpus_per_node = 0 leaves a node without processes: set processes_per_node"
        )
    seconds = limit_seconds(profile.time_limit)
    if seconds is None:
        raise UserError(
            f"{source}: time_limit = {profile.time_limit} is no time of Slurm's: write 30, "
            "12:00:00 or 2-12:00:00 (minutes, hours:minutes:seconds, days-hours:minutes:seconds)"
        )
    if seconds <= profile.warning_seconds:
        raise UserError(
            f"{source}: warning_seconds = {profile.warning_seconds} begins before the job, whose "
            f"time_limit is {seconds} seconds: lower it"
        )


def limit_seconds(text: str) -> int | None:
    """A time limit as Slurm writes it, in seconds; None if it is none."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) < 3:  # minutes[:seconds]
        minutes, seconds = (*numbers, 0)[:2]
        return minutes * 60 + seconds
    return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
