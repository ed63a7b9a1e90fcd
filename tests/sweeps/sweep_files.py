"""Sweeps over the smallest run, and points that were trained in this process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ttt_megatron.config.yaml_text import dump_yaml
from ttt_megatron.sweeps.points import Point, make_points
from ttt_megatron.sweeps.spec import Sweep
from ttt_megatron.sweeps.sweep_file import read_sweep
from ttt_megatron.training.preflight import resolve_run
from ttt_megatron.training.run import run_training

BASE: dict[str, Any] = {
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
    "optimizer": {"lr": 1e-2},
    "training": {
        "steps": 3,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "save_interval": 2,
        "eval_sequences": 2,
        "device": "cpu",
    },
    "tracking": {"mlflow": False},
}


def write_sweep(folder: Path, data: Path, **keys: Any) -> Path:
    """A base recipe and a sweep's file around it, both in `folder`."""
    base = {**BASE, "data": {"path": str(data), "sequence_length": 64}}
    (folder / "base.yaml").write_text(dump_yaml(base))
    path = folder / "sweep.yaml"
    path.write_text(dump_yaml({"base": "base.yaml", "output": str(folder / "out"), **keys}))
    return path


def read_points(path: Path, overrides: Sequence[str] = ()) -> tuple[Sweep, list[Point], Path]:
    """The sweep, its points resolved against their data, and its folder."""
    sweep = read_sweep(path)
    output = Path(sweep.output)
    points = make_points(sweep, output, overrides)
    return sweep, [replace(p, config=resolve_run(p.config)) for p in points], output


def train(points: Sequence[Point]) -> None:
    """Trains points here, which is quicker than in processes of their own."""
    for point in points:
        run_training(point.config)
