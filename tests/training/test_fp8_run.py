"""Runs in float8 with delayed scales: going on with them, and under other layouts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from small_run import losses, small_run
from torch import Tensor

from ttt_kernels.fp8_linear.scaling import ROLES
from ttt_megatron.config import ParallelConfig, RunConfig
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.groups import layout, process_groups, processes
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS
from ttt_megatron.training.metrics_file import METRICS_FILE
from ttt_megatron.training.preflight import resolve_run
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.weights import read_weights

FLOAT8: dict[str, Any] = {
    "training__precision": "fp8",
    "fp8__compute": "fp32",
    "fp8__recipe": "delayed",
    "fp8__history": 4,
    "model__vocab_size": 258,
    "model__hidden_size": 32,
    "model__ffn_hidden_size": 32,
    "model__num_layers": 3,
}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one process, and evaluations between its steps. Read only."""
    output = tmp_path_factory.mktemp("float8") / "run"
    evaluated = {"training__eval_interval": 2, "training__eval_sequences": 2}
    config = small_run(data, output, **FLOAT8, **evaluated, training__keep_last=9)
    run_training(config)
    return config


def _at_step_3(config: RunConfig, target: Path) -> RunConfig:
    """The same run as it was when it was killed after its third step's checkpoint."""
    ignored = shutil.ignore_patterns("step-00000006", ".lock")
    shutil.copytree(config.training.output, target, ignore=ignored)
    return replace(config, training=replace(config.training, output=str(target)))


def _history(config: RunConfig) -> Tensor:
    """The scales' history where a run's newest checkpoint left it."""
    with process_groups("cpu") as groups:
        scales = build_trainer(config, groups).float8
    assert scales is not None
    history: Tensor = scales.state_dict()["history"]
    return history


def test_a_killed_run_goes_on_with_the_same_numbers(alone: RunConfig, tmp_path: Path) -> None:
    rest = _at_step_3(alone, tmp_path / "rest")
    halfway = _history(rest)
    assert halfway.shape == (12, 5, 4)
    assert (halfway[..., :3] > 0).any(dim=1).all()
    assert not halfway[..., 3].any()
    assert run_training(rest).step == 6
    whole, last = Path(alone.training.output), f"{CHECKPOINTS}/step-00000006"
    assert losses(tmp_path / "rest") == losses(whole)
    ours, theirs = (read_weights(run / last) for run in (tmp_path / "rest", whole))
    assert all(ours[name].equal(weight) for name, weight in theirs.items())
    end = _history(alone)
    assert _history(rest).equal(end)
    # The newest first: step 3's is the last of four at step 6.
    assert end[..., 3].equal(halfway[..., 0])


def test_evaluations_leave_the_training_alone(alone: RunConfig, data: Path, tmp_path: Path) -> None:
    run_training(small_run(data, tmp_path / "run", **FLOAT8))
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert not any("validation" in name for row in rows for name in row)
    assert losses(tmp_path / "run") == losses(Path(alone.training.output))


def _in_layouts(configs: list[RunConfig]) -> list[tuple[dict[int, float], Tensor]]:
    found = []
    with processes("cpu") as device:
        for config in configs:
            Path(config.training.output).mkdir(exist_ok=True)
            with layout(device, config.parallel) as groups:
                trainer = build_trainer(config, groups)
                trainer.fit()
                assert trainer.float8 is not None
                history = trainer.float8.state_dict()["history"]
                everyone = groups.gather_objects(history)
                assert all(torch.equal(history, other) for other in everyone)
                found.append((losses(Path(config.training.output)), history))
    return found


@pytest.mark.slow
def test_all_ranks_go_on_with_the_scales_of_the_whole_model(
    alone: RunConfig, tmp_path: Path
) -> None:
    layouts = (
        ParallelConfig(tensor=2, sequence_parallel=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(context=2, context_order="zigzag"),
    )
    runs = [_at_step_3(alone, tmp_path / str(number)) for number in range(len(layouts))]
    configs = [replace(run, parallel=one) for run, one in zip(runs, layouts, strict=True)]
    expected, history = losses(Path(alone.training.output)), _history(alone)
    found = launch(_in_layouts, (configs,), 2)
    for parallel, (found_losses, found_history) in zip(layouts, found, strict=True):
        assert found_losses == pytest.approx(expected, rel=2e-3)
        # A part's loss is multiplied by the number of parts, over which gradients are averaged.
        for role, name in enumerate(ROLES):
            factor = parallel.context if name in ("tangent", "cotangent") else 1
            seen = found_history[:, role, :3] / factor
            torch.testing.assert_close(seen, history[:, role, :3], rtol=0.2, atol=1e-6)


def test_a_missing_backend_is_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    config = small_run(
        data,
        tmp_path,
        training__precision="fp8",
        training__device="auto",
        model__hidden_size=32,
        model__ffn_hidden_size=32,
        fp8__backend="transformer_engine",
    )
    with pytest.raises(UserError, match=r"fp8\.backend=transformer_engine is not to be had: no"):
        resolve_run(config)
    resolve_run(replace(config, fp8=replace(config.fp8, backend="auto")))
