"""The smallest run that has everything: two blocks, prime MLP, warm-ups, accumulation."""

import json
import random
from pathlib import Path
from typing import Any

from ttt_megatron.config import RunConfig, from_dict
from ttt_megatron.data.prepare import PrepareOptions, prepare
from ttt_megatron.training.metrics_file import METRICS_FILE

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 257,
        "num_layers": 2,
        "num_suffix_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_hidden_size": 24,
        "window_size": 16,
    },
    "inner": {"chunk_size": 8, "lr_start": 0.1, "lr_warmup_fraction": 0.2},
    "data": {"sequence_length": 32},
    "optimizer": {"lr": 1e-2, "warmup_fraction": 0.2},
    "training": {
        "steps": 6,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "save_interval": 3,
        "eval_sequences": 0,
        "device": "cpu",
    },
    "tracking": {"mlflow": False, "progress": False},
}


def make_data(folder: Path) -> Path:
    """Prepares 24 documents of random words."""
    generator = random.Random(3)
    source = folder / "text"
    source.mkdir(parents=True)
    for number in range(24):
        words = generator.choices(("sea", "whale", "ship", "harpoon", "night"), k=200)
        (source / f"{number:02d}.txt").write_text(" ".join(words))
    output = folder / "data"
    prepare(PrepareOptions(inputs=(str(source),), output=str(output), validation=0.25, workers=1))
    return output


def small_run(data: Path, output: Path, **changes: Any) -> RunConfig:
    """The run, with settings changed by dotted keys written with two underscores."""
    values = {section: dict(settings) for section, settings in SETTINGS.items()}
    values["data"]["path"] = str(data)
    values["training"]["output"] = str(output)
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return from_dict(values)


def losses(output: Path) -> dict[int, float]:
    """Training loss by step, as logged."""
    rows = [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
