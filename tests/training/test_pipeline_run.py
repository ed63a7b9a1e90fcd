"""Runs in pipeline stages, and checkpoints that go from layout to layout."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from small_run import small_run

from ttt_megatron.config import RunConfig
from ttt_megatron.parallel.groups import layout, processes
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS
from ttt_megatron.training.metrics_file import METRICS_FILE
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.weights import read_weights

BOUND = 1e-10
SIX = {
    "training__precision": "fp64",
    "training__keep_last": 9,
    "training__eval_interval": 2,
    "training__eval_sequences": 3,
    # One row more than there are tokens, so that the vocabulary divides.
    "model__vocab_size": 258,
    "model__num_layers": 3,
    "inner__lr_start": 1.0,
}
SQUARE = {"parallel__tensor": 2, "parallel__context": 2}
STAGES = {"parallel__pipeline": 2, "parallel__data": 2}
TURNS = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}


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


def _fit(configs: Sequence[RunConfig], copies: Sequence[tuple[Path, Path]]) -> None:
    """Ends the runs one after the other; each may go on from the middle of one before it."""
    with processes("cpu") as device:
        for config, (source, target) in zip(configs, copies, strict=True):
            with layout(device, config.parallel) as groups:
                if groups.is_main:
                    target.mkdir() if source == target else _halfway(source, target)
                groups.barrier()
                build_trainer(config, groups).fit()


def test_checkpoints_go_from_layout_to_layout_and_back(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    def run(name: str, **changes: Any) -> RunConfig:
        return small_run(data, tmp_path / name, **SIX, **changes)

    square, stages, back = (tmp_path / name for name in ("square", "stages", "back"))
    configs = [run("square", **SQUARE), run("stages", **STAGES), run("back", **SQUARE)]
    launch(_fit, (configs, [(square, square), (square, stages), (stages, back)]), 4)
    _halfway(stages, tmp_path / "one")
    run_training(run("one"))
    for name in ("square", "stages", "back", "one"):
        _same_course(tmp_path / name, alone)


@pytest.mark.slow
def test_stages_in_turn_train_what_one_process_does(data: Path, tmp_path: Path) -> None:
    config = small_run(data, tmp_path / "turns", **(SIX | {"model__num_layers": 4}), **TURNS)
    launch(run_training, (config,), 2)
    whole = small_run(data, tmp_path / "whole", **(SIX | {"model__num_layers": 4}))
    run_training(whole)
    _same_course(tmp_path / "turns", tmp_path / "whole")


@pytest.mark.slow
def test_stages_start_from_other_weights(data: Path, alone: Path, tmp_path: Path) -> None:
    plain = {"model__num_suffix_layers": 0, "inner__mode": "off"}
    run_training(small_run(data, tmp_path / "plain", **SIX, **plain))
    for name, source in (("later", alone), ("extended", tmp_path / "plain")):
        start = {"training__init_from": str(source)}
        run_training(small_run(data, tmp_path / name, **SIX, **start))
        staged = small_run(data, tmp_path / f"{name} in stages", **SIX, **start, **STAGES)
        launch(run_training, (staged,), 4)
        _same_course(tmp_path / f"{name} in stages", tmp_path / name)
