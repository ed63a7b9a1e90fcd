"""Where and with what a benchmark was run."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import ttt_kernels
from ttt_megatron import __version__
from ttt_megatron.bench.ceilings import Ceilings

_PACKAGES = ("triton", "megatron-core", "transformer-engine", "numpy")


def describe(device: torch.device, ceilings: Ceilings, arguments: list[str]) -> dict[str, Any]:
    """Date, device, versions, command, commit and ceilings."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "backend": str(ttt_kernels.backend(device)),
        "command": shlex.join(["ttt-megatron", "bench", *arguments]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "ttt_megatron": __version__,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "ceilings": ceilings.as_dict(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine() or "unknown processor"
    return f"CPU: {name}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def command_line() -> list[str]:
    """The subcommand's arguments as they were given."""
    words = sys.argv[1:]
    return words[1:] if words[:1] == ["bench"] else words
