"""Runs under context parallelism, and checkpoints that go on without it and with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import launch
from small_run import small_run

from ttt_megatron.cli.main import main
from ttt_megatron.config import to_yaml
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS
from ttt_megatron.training.metrics_file import METRICS_FILE
from ttt_megatron.training.run import run_training
from ttt_megatron.training.weights import read_weights

BOUND = 1e-10
SIX = {
    "training__precision": "fp64",
    "training__keep_last": 9,
    "inner__lr_start": 1.0,
    "training__eval_interval": 2,
    "training__eval_sequences": 3,
}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process. Read only."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run_training(small_run(data, output, **SIX))
    return output


def _halfway(run: Path, target: Path) -> Path:
    """A copy of a run that ended after its checkpoint of step 3."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("step-00000006", ".lock"))
    return target


def _rows(run: Path) -> list[dict[str, float]]:
    """All figures but the times, and but the share that is kept in single precision."""
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    own = ("time", "seconds", "tokens_per_second", "model_flops_per_second", "memory_bytes")
    own = (*own, "clipped_share")
    return [{name: value for name, value in row.items() if name not in own} for row in rows]


def _same_course(run: Path, expected: Path) -> None:
    ours, theirs = _rows(run), _rows(expected)
    # Six steps, three evaluations.
    assert len(ours) == len(theirs) == 9
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=BOUND, abs=0)
    weights, wanted = (read_weights(p / CHECKPOINTS / "step-00000006") for p in (run, expected))
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        bound = BOUND * weight.abs().max().item()
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=bound, msg=name)


def test_two_parts_train_what_one_process_does_and_go_on_alone(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    recipe, run = tmp_path / "run.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(small_run(data, run, **SIX)))
    assert main(["train", str(recipe), "parallel.context=2"]) == 0
    _same_course(run, alone)
    rest = _halfway(run, tmp_path / "rest")
    assert run_training(small_run(data, rest, **SIX)).step == 6
    _same_course(rest, alone)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_parts(data: Path, alone: Path, tmp_path: Path) -> None:
    run = _halfway(alone, tmp_path / "run")
    config = small_run(data, run, **SIX, parallel__context=2)
    assert launch(run_training, (config,), 2).step == 6
    _same_course(run, alone)
