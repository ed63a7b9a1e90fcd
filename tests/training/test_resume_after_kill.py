"""Real processes, killed without warning, must leave a run that goes on as if nothing had been."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import losses, small_run

from ttt_megatron.config import RunConfig, to_yaml
from ttt_megatron.training.checkpoint_folder import list_checkpoints
from ttt_megatron.training.run import run_training


def _start(config: RunConfig, recipe: Path) -> subprocess.Popen[str]:
    recipe.write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "ttt_megatron.cli.main", "train", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(config: RunConfig, recipe: Path) -> str:
    process = _start(config, recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def _kill_during(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """SIGKILL to the launcher at the moment a path appears."""
    deadline = time.monotonic() + 240
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums are only bitwise equal when equally many threads make them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_runs_resume_exactly(data: Path, tmp_path: Path) -> None:
    def config(name: str, processes: int = 1) -> RunConfig:
        return small_run(
            data,
            tmp_path / name,
            training__steps=20,
            training__save_interval=2,
            training__precision="fp64",
            training__async_save=name != "whole",
            parallel__data=processes,
        )

    run_training(config("whole"))
    checkpoints = tmp_path / "killed" / "checkpoints"
    process = _start(config("killed"), tmp_path / "killed.yaml")
    # In the midst of writing the checkpoint after step 6.
    _kill_during(process, checkpoints, "step-00000006.tmp-*/state")
    done = [path.name for path in list_checkpoints(checkpoints)]
    assert done[-1] in ("step-00000004", "step-00000006")
    assert 0 < len(losses(tmp_path / "killed")) < 20
    shutil.copytree(tmp_path / "killed", tmp_path / "pair")
    exact = losses(tmp_path / "whole")
    assert list(exact) == list(range(1, 21))

    run_training(config("killed"))
    assert losses(tmp_path / "killed") == exact

    # Two processes read the same rows in the same order: others would change the first digits.
    output = _finish(config("pair", processes=2), tmp_path / "pair.yaml")
    assert f"going on from {tmp_path / 'pair' / 'checkpoints' / done[-1]}" in output
    pair = losses(tmp_path / "pair")
    assert list(pair) == list(exact)
    assert list(pair.values()) == pytest.approx(list(exact.values()), rel=1e-9)
