"""Real processes, killed without warning, must leave a run that goes on as if nothing had been."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def _kill_during(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """SIGKILL to the launcher at the moment a path appears."""
    deadline = time.monotonic() + 60
    while not any(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_runs_resume_exactly(data: Path, tmp_path: Path) -> None:
    def config(name: str, processes: int) -> RunConfig:
        return small_run(
            data,
            tmp_path / name,
            training__steps=30,
            training__save_interval=2,
            training__precision="fp64",
            parallel__data=processes,
        )

    whole = config("whole", 2)
    _finish(whole, tmp_path / "whole.yaml")
    killed = config("killed", 2)
    checkpoints = tmp_path / "killed" / "checkpoints"
    # In the midst of writing the checkpoint after step 6: an unfinished folder is all there is.
    _kill_during(_start(killed, tmp_path / "killed.yaml"), checkpoints, "step-00000006.tmp-*/state")
    # No worker outlives its launcher, or the next run would meet it.
    done = [path.name for path in list_checkpoints(checkpoints)]
    assert 0 < len(losses(tmp_path / "killed")) < 30
    assert done[-1] in ("step-00000004", "step-00000006")
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    output = _finish(killed, tmp_path / "killed.yaml")
    assert f"going on from {checkpoints / done[-1]}" in output
    exact = losses(tmp_path / "whole")
    assert list(exact) == list(range(1, 31))
    assert losses(tmp_path / "killed") == exact
    # One process instead of two reads the same rows: other rows would differ in the first digits.
    run_training(config("alone", 1))
    alone = losses(tmp_path / "alone")
    assert list(alone) == list(exact)
    assert list(alone.values()) == pytest.approx(list(exact.values()), rel=1e-9)
