"""A run of a few steps, as the commands that follow training find it."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from ttt_megatron.config import from_dict


@dataclass(frozen=True)
class TrainedRun:
    """Folders of the data, of the run, and of a plain control trained on the same data."""

    data: Path
    output: Path
    control: Path


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Random words at byte level, a model of 2 blocks, 4 steps, tracked by MLflow. Read only."""
    from ttt_megatron.data.prepare import PrepareOptions, prepare
    from ttt_megatron.training.run import run_training

    root = tmp_path_factory.mktemp("trained")
    source, data = root / "text", root / "data"
    source.mkdir()
    generator = random.Random(3)
    for number in range(24):
        words = generator.choices(("sea", "whale", "ship", "harpoon", "night"), k=60 + number)
        (source / f"{number:02d}.txt").write_text(" ".join(words))
    prepare(PrepareOptions(inputs=(str(source),), output=str(data), validation=0.25, workers=1))
    for name, mode, tracked in (("run", "meta", True), ("control", "off", False)):
        values = {
            "name": name,
            "model": {
                "vocab_size": 264,
                "num_layers": 2,
                "num_suffix_layers": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "ffn_hidden_size": 24,
                "window_size": 16,
                "init_std": 0.2,
            },
            "inner": {"chunk_size": 8, "mode": mode},
            "data": {"path": str(data), "sequence_length": 64},
            "optimizer": {"lr": 1e-2},
            "training": {
                "steps": 4,
                "global_batch_size": 2,
                "micro_batch_size": 2,
                "eval_sequences": 0,
                "device": "cpu",
                "output": str(root / name),
            },
            "tracking": {
                "mlflow": tracked,
                "progress": False,
                "tracking_uri": f"sqlite:///{root / 'mlflow.db'}",
            },
        }
        run_training(from_dict(values))
    return TrainedRun(data, root / "run", root / "control")
