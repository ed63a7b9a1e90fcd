"""Runs that torchrun starts: ranks that do not agree, and ranks that are lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small_run import small_run

from ttt_megatron.config import RunConfig, to_yaml

pytestmark = pytest.mark.slow

LONG = {"training__steps": 100_000, "training__save_interval": 100_000}


def _start(config: RunConfig, folder: Path, override: str = "") -> subprocess.Popen[str]:
    """Two ranks, of which rank 1 is given one more setting."""
    recipe, command = folder / "run.yaml", folder / "rank.sh"
    recipe.write_text(to_yaml(config))
    train = f"exec {sys.executable} -m ttt_megatron.cli.main train {recipe}"
    command.write_text(f'[ "$RANK" = 1 ] && {train} {override}\n{train}\n')
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "--no-python", "sh", str(command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0.5", "has optimizer.lr = 0.5 where rank 0 has 0.01"),
        ("model.hidden_size=32", "has model.hidden_size = 32 where rank 0 has 16"),
        ("parallel.data=4", "rank 1: torchrun started 2 processes, but the recipe's"),
        ("data.path=nowhere", "rank 1: nowhere"),
    ],
)
def test_two_recipes_end_before_the_first_step(
    override: str, message: str, data: Path, tmp_path: Path
) -> None:
    config = small_run(data, tmp_path / "run", parallel__data=2, **LONG)
    process = _start(config, tmp_path, override)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert message in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "fate"), [(signal.SIGKILL, "gone"), (signal.SIGSTOP, "stopped")]
)
def test_a_lost_rank_ends_the_run_and_is_named(
    number: signal.Signals, fate: str, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    config = small_run(data, output, parallel__data=2, parallel__timeout_minutes=0.5, **LONG)
    process = _start(config, tmp_path)
    deadline = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [p for p in ranks if p.environ().get("RANK") == "1"]
    victim.send_signal(number)
    told, _ = process.communicate(timeout=150)
    assert process.returncode != 0
    assert f"error: rank 1 (process {victim.pid} on " in told
    assert f") is {fate}: rank 0 " in told
    assert not any(rank.is_running() for rank in ranks)
