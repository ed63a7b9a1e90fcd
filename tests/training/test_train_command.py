"""`ttt-megatron train` as a user calls it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import losses, small_run

from ttt_megatron.cli import train
from ttt_megatron.cli.main import main
from ttt_megatron.config import RunConfig, to_yaml
from ttt_megatron.training.result import TrainingResult


def _recipe(config: RunConfig, path: Path) -> str:
    path.write_text(to_yaml(config))
    return str(path)


def _run(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ttt_megatron.cli.main", "train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.chunk_size=7", "inner.chunk_size = 7"),
        ("data.path=/nowhere", "/nowhere"),
        ("data.sequence_length=100000", "100000"),
        ("model.vocab_size=10", "model.vocab_size=10"),
        ("training.init_from=/nowhere", "/nowhere holds no checkpoint"),
        ("training.output=/proc/run", "training.output=/proc/run"),
    ],
)
def test_what_cannot_run_is_refused_before_any_process_starts(
    override: str,
    said: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = _recipe(small_run(data, tmp_path / "run"), tmp_path / "run.yaml")
    # A chunk that divides every sequence length tried here.
    assert main(["train", recipe, "inner.chunk_size=4", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("restarts", "override", "cause"),
    [
        ("3", "parallel.elastic=false", "--max-restarts 3"),
        ("0", "parallel.elastic=true", "elastic"),
    ],
)
def test_fresh_is_refused_where_torchrun_would_start_it_again(
    restarts: str,
    override: str,
    cause: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = _recipe(small_run(data, tmp_path / "run"), tmp_path / "run.yaml")
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("TORCHELASTIC_MAX_RESTARTS", restarts),
    ):
        monkeypatch.setenv(name, value)
    assert main(["train", recipe, override, "--fresh"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --fresh, and torchrun may start the ranks again")
    assert cause in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_stop_is_no_success_on_any_rank(
    rank: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(small_run(data, tmp_path / "run"), tmp_path / "run.yaml")
    stopped = TrainingResult(
        step=3,
        steps=6,
        last_loss=1.0,
        checkpoint="c",
        tracking_store=None,
        tracking_run=None,
        stop_signal=signal.SIGTERM,
    )
    monkeypatch.setattr(train, "launch", lambda *arguments: stopped)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", recipe]) == 128 + signal.SIGTERM


def test_sigterm_saves_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    config = small_run(data, tmp_path / "run", training__steps=2000, training__save_interval=2000)
    recipe = _recipe(config, tmp_path / "run.yaml")
    process = _run(recipe)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM
    step = max(losses(tmp_path / "run"))
    assert step < 2000
    saved = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
    assert saved.is_dir()
    assert f"stopped after step {step} of 2000, saved in {saved}; the same command" in error
