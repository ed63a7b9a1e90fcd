"""Small recipes and profiles for jobs on the CPU."""

import random
from pathlib import Path
from typing import Any

from ttt_megatron.cluster.profile import Profile, profile_from
from ttt_megatron.config.yaml_text import dump_yaml
from ttt_megatron.data.prepare import PrepareOptions, prepare

RECIPE: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "num_suffix_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_hidden_size": 24,
        "window_size": 16,
        "init_std": 0.2,
    },
    "inner": {"chunk_size": 8},
    "data": {"sequence_length": 32},
    "optimizer": {"lr": 1e-2},
    "parallel": {"data": 2, "timeout_minutes": 1.0},
    "training": {
        "steps": 60,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp64",
        "save_interval": 10,
        "eval_sequences": 0,
        "device": "cpu",
    },
    "tracking": {"mlflow": False, "progress": False},
}
CPU = {
    "gpu": "cpu",
    "gpus_per_node": 0,
    "processes_per_node": 1,
    "time_limit": "10",
    "warning_seconds": 30,
    "backoff_seconds": 1,
}


def make_data(folder: Path) -> Path:
    """Prepared documents of random words."""
    generator = random.Random(3)
    source = folder / "text"
    source.mkdir(parents=True)
    for number in range(24):
        words = generator.choices(("sea", "whale", "ship", "harpoon", "night"), k=200)
        (source / f"{number:02d}.txt").write_text(" ".join(words))
    data = folder / "data"
    prepare(PrepareOptions(inputs=(str(source),), output=str(data), validation=0.25, workers=1))
    return data


def write_recipe(path: Path, data: Path, output: str, **training: Any) -> Path:
    """A recipe's file; `training` are settings of that section."""
    values = {section: dict(settings) for section, settings in RECIPE.items()}
    values["data"]["path"] = str(data)
    values["training"] |= {"output": output, **training}
    path.write_text(dump_yaml({"name": path.stem, **values}))
    return path


def write_profile(path: Path, **keys: Any) -> Path:
    """A profile's file around the small one of CPUs."""
    path.write_text(dump_yaml({**CPU, **keys}))
    return path


def cpu_profile(**keys: Any) -> Profile:
    """The same as an object."""
    return profile_from({**CPU, **keys}, "cpu", "test")
