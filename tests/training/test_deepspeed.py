"""The DeepSpeed engine beside megatron-core's: the same course, and checkpoints for both."""

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from small_run import losses, small_run
from torch import Tensor

from ttt_megatron.config import RunConfig, from_dict
from ttt_megatron.data.stream import Batch
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.parallel.groups import Groups, layout, processes
from ttt_megatron.training.engines import build_engine
from ttt_megatron.training.preflight import resolve_run
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.step import reduce_measurements
from ttt_megatron.training.weights import build_learner

LENGTH, BATCH = 12, 12
RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 20,
        "num_layers": 3,
        "num_suffix_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "ffn_hidden_size": 12,
        "window_size": 7,
    },
    "inner": {"chunk_size": 4, "lr": 0.1},
    "data": {"sequence_length": LENGTH},
    # Some gradients are clipped. A large epsilon keeps Adam from making steps out of rounding.
    "optimizer": {"lr": 1e-2, "warmup_fraction": 0.0, "clip_grad": 0.5, "eps": 1e-2},
    "training": {"steps": 20, "global_batch_size": BATCH, "micro_batch_size": 2, "seed": 5},
}
FORGOTTEN = "model.layers.0.mlp_norm.weight"
Course = tuple[list[tuple[float, float, bool]], dict[str, Tensor], int]
"""Loss, gradient norm and whether the update was made, by step; parameters at the end; how often
gradients came to every parameter."""


def _config(engine: str, stage: int = 1, *, data: int = 2, **optimizer: Any) -> RunConfig:
    changes = {
        "optimizer": RECIPE["optimizer"] | {"engine": engine, "zero_stage": stage} | optimizer,
        "parallel": {"data": data},
    }
    return from_dict(RECIPE | changes)


def _batch(step: int, groups: Groups) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, 19, (BATCH, LENGTH + 1), generator=generator)
    mask = torch.rand(BATCH, LENGTH, generator=generator) > 0.2
    places = torch.zeros(BATCH, 2, dtype=torch.int64)
    whole = (rows[:, :-1], rows[:, 1:], mask, torch.arange(BATCH), places)
    share = BATCH // groups.data_size
    return Batch(*[t[groups.data_rank * share : (groups.data_rank + 1) * share] for t in whole])


def _forget(learner: Learner) -> None:
    """Every other call gives one parameter no gradient."""
    parameter, whole, calls = learner.get_parameter(FORGOTTEN), learner.forward, 0

    def forward(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        parameter.requires_grad_(calls % 2 == 0)
        output = whole(*args)
        parameter.requires_grad_(True)
        return output

    learner.forward = forward  # type: ignore[method-assign]


def _course(groups: Groups, config: RunConfig, micro: int, forget: bool = False) -> Course:
    """Five steps. One rank's gradient is not finite in the second and third; the third's loss
    counts as not finite either, so that no update is tried."""
    learner, gradients = build_learner(config), 0

    def count(parameter: Tensor) -> None:
        nonlocal gradients
        gradients += 1

    if forget:
        _forget(learner)
    engine, figures = build_engine([learner], config, groups), []
    for parameter in learner.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    for step in range(5):
        poisoned = step in (1, 2) and groups.rank == groups.world_size - 1
        engine.zero_grad()
        micro_batches = _batch(step, groups).split(micro)
        inner_lr = float("nan") if poisoned else config.inner.lr
        measured = engine.forward_backward(micro_batches, inner_lr)
        if step != 2:
            update = engine.step(step)
            loss = reduce_measurements(measured, [], groups)[0].loss
            figures.append((loss, update.grad_norm, update.applied))
    engine.settle()
    ended = {name: p.detach().clone() for name, p in learner.named_parameters()}
    for others in groups.gather_objects(ended):
        assert all(torch.equal(others[name], ended[name]) for name in ended)
    return figures, ended, gradients


def _two_ranks(half_trained: Path, data: Path, folder: Path) -> dict[str, Course]:
    """Everything that takes two processes, as they are slow to start."""
    zero1, zero2 = _config("deepspeed", 1), _config("deepspeed", 2)
    mcore, decay = _config("megatron"), {"decay": "matrices", "weight_decay": 3.0}
    with processes("cpu") as device:
        with layout(device, zero1.parallel) as groups:
            courses = {
                "mcore": _course(groups, mcore, 2),
                "zero1": _course(groups, zero1, 2),
                "zero2": _course(groups, zero2, 2),
                "mcore, at once": _course(groups, mcore, 6),
                "zero2, at once": _course(groups, zero2, 6),
                "mcore, forgetful": _course(groups, _config("megatron", **decay), 2, forget=True),
                "zero1, forgetful": _course(groups, _config("deepspeed", **decay), 2, forget=True),
                "zero2, forgetful": _course(
                    groups, _config("deepspeed", 2, **decay), 2, forget=True
                ),
            }
        for config in (_run(data, folder / "ours", 1, 2), _run(data, half_trained, 2, 2)):
            with layout(device, config.parallel) as groups:
                build_trainer(config, groups).fit()
    return courses


def _run(data: Path, output: Path, stage: int = 0, size: int = 1) -> RunConfig:
    """A whole run of six steps; stage 0 is megatron-core's engine."""
    engine = {"optimizer__engine": "deepspeed", "optimizer__zero_stage": stage} if stage else {}
    return small_run(
        data, output, parallel__data=size, training__keep_last=9, optimizer__eps=1e-5, **engine
    )


def _halfway(run: Path, target: Path) -> Path:
    """A copy of a run that ended after its checkpoint of step 3."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("step-00000006", ".lock"))
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `alone`, a run of one process under megatron-core; `theirs`, one that goes on with its
    half in two under ZeRO-2; `ours`, one of two under ZeRO-1. Read only."""
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def courses(folder: Path, data: Path) -> dict[str, Course]:
    """What two processes computed; makes the runs in `folder`."""
    run_training(_run(data, folder / "alone"))
    theirs = _halfway(folder / "alone", folder / "theirs")
    (folder / "ours").mkdir()
    return launch(_two_ranks, (theirs, data, folder), 2)


def _differ(one: Course, other: Course) -> tuple[float, float]:
    """The largest relative differences of losses and norms, and of parameters."""
    assert [row[2] for row in one[0]] == [row[2] for row in other[0]]
    figures = [
        abs(a - b) / abs(b)
        for ours, theirs in zip(one[0], other[0], strict=True)
        for a, b in zip(ours[:2], theirs[:2], strict=True)
        if ours[2]
    ]
    parameters = [
        ((one[1][name] - p).abs().max() / p.abs().max()).item() for name, p in other[1].items()
    ]
    return max(figures), max(parameters)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("zero1", "mcore"),
        ("zero1, forgetful", "mcore, forgetful"),
        ("zero2, at once", "mcore, at once"),
    ],
)
def test_courses_are_the_same_bit_by_bit(
    courses: dict[str, Course], ours: str, theirs: str
) -> None:
    figures, parameters = _differ(courses[ours], courses[theirs])
    # Norms are sums in float64, taken in another order.
    assert figures < 1e-14
    assert parameters == 0
    assert [row[2] for row in courses[ours][0]] == [True, False, True, True]
    assert courses[ours][2] == courses[theirs][2]


@pytest.mark.parametrize("kind", ["", ", forgetful"])
def test_zero_2_sums_micro_batches_in_another_order(courses: dict[str, Course], kind: str) -> None:
    ours, theirs = courses[f"zero2{kind}"], courses[f"mcore{kind}"]
    assert max(_differ(ours, theirs)) < 1e-5
    assert ours[2] == theirs[2]


def test_what_is_compared_can_differ(courses: dict[str, Course]) -> None:
    assert max(_differ(courses["mcore, forgetful"], courses["mcore"])) > 1e-3
    # Every gradient comes once a micro-batch: 5 steps of 3 on a rank, and one parameter left out.
    parameters = len(courses["mcore"][1])
    assert courses["zero2"][2] == 15 * parameters
    assert courses["zero2, forgetful"][2] == 15 * parameters - 8


def test_runs_go_on_under_the_other_engine(
    courses: dict[str, Course], folder: Path, data: Path, tmp_path: Path
) -> None:
    back = _halfway(folder / "ours", tmp_path / "back")
    run_training(_run(data, back))
    expected = losses(folder / "alone")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    for run in (folder / "ours", folder / "theirs", back):
        assert losses(run) == pytest.approx(expected, rel=1e-6, abs=0)


def test_a_process_runs_several_and_is_left_as_it_was(
    courses: dict[str, Course], folder: Path, data: Path, tmp_path: Path
) -> None:
    environment, filters = dict(os.environ), list(warnings.filters)
    for stage in (1, 2):
        run_training(_run(data, tmp_path / str(stage), stage))
        assert losses(tmp_path / str(stage)) == losses(folder / "alone")
    assert dict(os.environ) == environment
    assert warnings.filters == filters


def test_deepspeed_that_is_not_installed_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _run(data, tmp_path, 1)
    assert resolve_run(config).optimizer.engine == "deepspeed"
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'ttt-megatron\[deepspeed\]', or set"):
        resolve_run(config)
