"""Where, by which job, from which code and from which recipe a run was trained, as tags."""

import contextlib
import getpass
import hashlib
import os
import platform
import socket
import subprocess
from pathlib import Path

import ttt_megatron
from ttt_megatron.config import to_yaml
from ttt_megatron.config.schema import RunConfig

# Set by whoever reads the recipe, for the processes that train by it.
RECIPE_VARIABLE = "TTT_MEGATRON_RECIPE"
_SLURM = {
    "slurm.job_id": "SLURM_JOB_ID",
    "slurm.job_name": "SLURM_JOB_NAME",
    "slurm.array_job_id": "SLURM_ARRAY_JOB_ID",
    "slurm.array_task_id": "SLURM_ARRAY_TASK_ID",
    "slurm.restart_count": "SLURM_RESTART_COUNT",
    "slurm.nodes": "SLURM_JOB_NODELIST",
    "slurm.num_nodes": "SLURM_JOB_NUM_NODES",
    "slurm.partition": "SLURM_JOB_PARTITION",
    "slurm.cluster": "SLURM_CLUSTER_NAME",
    "torchrun.restart_count": "TORCHELASTIC_RESTART_COUNT",
}
_GIT_SECONDS = 10.0


def run_tags(config: RunConfig) -> dict[str, str]:
    """Everything that is known; what does not apply is left out. May take seconds."""
    tags = {
        "version": ttt_megatron.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "world_size": str(config.parallel.world_size),
        "settings.sha256": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
        **_slurm(),
        **_hardware(),
        **_recipe(),
        **_commit(Path(ttt_megatron.__file__).parent),
    }
    if config.training.init_from is not None:
        tags["init_from"] = config.training.init_from
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        tags["mlflow.user"] = str(os.getuid())
    return tags


def _slurm() -> dict[str, str]:
    return {tag: os.environ[name] for tag, name in _SLURM.items() if os.environ.get(name)}


def _hardware() -> dict[str, str]:
    import torch

    tags = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        tags["gpu"] = torch.cuda.get_device_name()
    return tags


def _recipe() -> dict[str, str]:
    path = os.environ.get(RECIPE_VARIABLE)
    if not path:
        return {}
    tags = {"recipe": path, "mlflow.source.name": path, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError):  # moved since: its settings are in run.yaml
        tags["recipe.sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return tags


def _commit(package: Path) -> dict[str, str]:
    """Of the checkout that the package is a part of; an environment may lie in another's."""
    if not _git(package, "ls-files", "--error-unmatch", "__init__.py"):
        return {}
    commit = _git(package, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return {
        "git.commit": commit,
        "git.changed": str(bool(changed)).lower(),
        "mlflow.source.git.commit": commit,
    }


def _git(folder: Path, *words: str) -> str:
    """What git says; empty if it cannot, or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
