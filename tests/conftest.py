"""What tests everywhere share: skips that say why, a run of a few steps and its export."""

import atexit
import gc
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ttt_megatron.config import from_dict

# Imports make a million objects and no garbage: see pytest_collection_finish.
gc.disable()

# Before transformers is imported: processes of tests must not share its cache of models' code.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


# Begun first, longest of all first, so that two workers end at about the same time.
LONGEST = (
    "kernels/test_interpreter.py",
    "parallel/test_context.py",
    "parallel/test_train_parts.py",
    "training/test_reshard.py",
    "training/test_resume_after_kill.py",
    "parallel/test_tensor_parallel.py",
    "training/test_saver.py",
    "training/test_context_run.py",
    "training/test_pipeline_run.py",
    "parallel/test_context_costs.py",
    "training/test_deepspeed.py",
    "service/test_serve_restart.py",
    "cli/test_evaluate_tasks.py",
    "meta/test_fp8.py",
    "baselines/test_training.py",
    "tools/test_check_parallel.py",
    "training/test_run.py",
    "parallel/test_launcher.py",
    "parallel/test_lost_ranks.py",
    "training/test_train_command.py",
)


def pytest_configure(config):
    """Workers take files in the order given below, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files first; skip what needs a CUDA device, or Triton's interpreter, without one."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST)}
    gone = [str(path) for path in place if not path.is_file()]
    if gone:
        raise pytest.UsageError(f"LONGEST names {gone[0]}, which is not there")
    items.sort(key=lambda item: place.get(item.path, len(place)))
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "there is no CUDA device"
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        missing["interpreter"] = "TRITON_INTERPRET=1 is not in the environment"
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """What the imports made is left out of every later collection of garbage, to save time."""
    gc.freeze()
    # nanobind counts what is left at the end, and would call all of it leaked.
    atexit.register(gc.unfreeze)
    gc.enable()


@dataclass(frozen=True)
class TrainedRun:
    """Folders of the data, of the run, and of a plain control trained on the same data."""

    data: Path
    output: Path
    control: Path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database, which takes seconds to make, to be copied."""
    from ttt_megatron.tracking.store import open_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> TrainedRun:
    """Random words at byte level, a model of 2 blocks, 4 steps, tracked by MLflow. Read only."""
    from ttt_megatron.data.prepare import PrepareOptions, prepare
    from ttt_megatron.training.run import run_training

    root = tmp_path_factory.mktemp("trained")
    shutil.copy(empty_store, root / "mlflow.db")
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


@pytest.fixture(scope="session")
def exported_run(trained_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run's export, verified. Read only."""
    from ttt_megatron.exchange.export import ExportSettings, export_checkpoint

    folder = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(trained_run.output, folder, ExportSettings())
    return folder
