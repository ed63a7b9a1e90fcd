"""Runs under tensor parallelism, and checkpoints that change their layout on the way."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import launch
from small_run import losses, small_run

from ttt_megatron.cli.main import main
from ttt_megatron.config import ParallelConfig, RunConfig, to_yaml
from ttt_megatron.errors import UserError
from ttt_megatron.parallel.groups import layout, processes
from ttt_megatron.parallel.replica import layer_slots
from ttt_megatron.training.checkpoint_folder import CHECKPOINTS
from ttt_megatron.training.initial_weights import start_from
from ttt_megatron.training.manifest import write_manifest
from ttt_megatron.training.preflight import resolve_run
from ttt_megatron.training.run import build_trainer, run_training
from ttt_megatron.training.weights import build_learner, load_learner, read_weights

BOUND = 1e-10
SIX = {
    "training__precision": "fp64",
    "training__keep_last": 9,
    # One row more than there are tokens, so that the vocabulary divides.
    "model__vocab_size": 258,
    "model__num_kv_heads": 2,
    "model__num_layers": 3,
    "inner__lr_start": 1.0,
    # Evaluated as well: all of a replica's ranks must read the same.
    "training__eval_sequences": 3,
}
PARTS = ParallelConfig(tensor=2)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process. Read only."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run_training(small_run(data, output, **SIX))
    return output


@pytest.fixture(scope="module")
def parts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two parts, as a user starts it. Read only."""
    folder = tmp_path_factory.mktemp("parts")
    recipe = folder / "run.yaml"
    recipe.write_text(to_yaml(small_run(data, folder / "run", **SIX)))
    overrides = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
    assert main(["train", str(recipe), *overrides]) == 0
    return folder / "run"


def _halfway(run: Path, target: Path) -> Path:
    """A copy of a run that ended after its checkpoint of step 3."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("step-00000006", ".lock"))
    return target


def _same_losses(run: Path, expected: Path) -> None:
    ours, theirs = losses(run), losses(expected)
    assert list(ours) == [1, 2, 3, 4, 5, 6]
    assert ours == pytest.approx(theirs, rel=BOUND, abs=0)


def _same_end(run: Path, expected: Path) -> None:
    ours, theirs = (read_weights(path / CHECKPOINTS / "step-00000006") for path in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        bound = BOUND * weight.abs().max().item()
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=bound, msg=name)


def _go_on(configs: list[RunConfig], source: Path) -> bool:
    """Ends the runs; then, whether a learner made of parts takes its parts of other weights."""
    with processes("cpu") as device:
        for config in configs:
            with layout(device, config.parallel) as groups:
                build_trainer(config, groups).fit()
        with layout(device, PARTS) as groups:
            learner = build_learner(configs[0], layer_slots(configs[0].model, PARTS))
            start_from([learner], source)
            weights = read_weights(source / CHECKPOINTS / "step-00000006")
            taken = [
                torch.equal(parameter, learner.model.slots.take_part(name, weights[name]))
                for name, parameter in learner.named_parameters()
            ]
            return all(all(everywhere) for everywhere in groups.gather_objects(taken))


def test_two_parts_train_what_one_process_does(alone: Path, parts: Path) -> None:
    _same_losses(parts, alone)
    _same_end(parts, alone)
    # Whole, whatever layout wrote it.
    learner, config, _ = load_learner(parts)
    assert config.parallel.tensor == 2
    assert learner.model.head_weight.shape == (258, 16)


def test_a_run_in_two_parts_goes_on_alone(
    data: Path, alone: Path, parts: Path, tmp_path: Path
) -> None:
    run = _halfway(parts, tmp_path / "run")
    assert run_training(small_run(data, run, **SIX)).step == 6
    _same_losses(run, alone)
    _same_end(run, alone)


def test_runs_go_on_as_replicas_and_in_parts(
    data: Path, alone: Path, parts: Path, tmp_path: Path
) -> None:
    replicas = _halfway(parts, tmp_path / "replicas")
    apart = _halfway(alone, tmp_path / "apart")
    configs = [
        small_run(data, replicas, **SIX, parallel__data=2),
        small_run(data, apart, **SIX, parallel__tensor=2),
    ]
    assert launch(_go_on, (configs, alone), 2)
    for run in (replicas, apart):
        _same_losses(run, alone)
        _same_end(run, alone)


def test_a_vocabulary_that_does_not_divide_is_refused(data: Path, tmp_path: Path) -> None:
    def resolved(size: int | None) -> RunConfig:
        return resolve_run(small_run(data, tmp_path, model__vocab_size=size, parallel__tensor=2))

    for size in (None, 257):
        with pytest.raises(UserError, match=r"model\.vocab_size=257 .* set model\.vocab_size=258"):
            resolved(size)
    assert resolved(258).model.vocab_size == 258


def test_parameters_of_another_model_are_refused(alone: Path, tmp_path: Path) -> None:
    checkpoint = alone / CHECKPOINTS / "step-00000006"
    others = {
        "lacks parameter model.layers.3": {"num_layers: 3": "num_layers: 4"},
        "has an unknown parameter model.layers.2.prime": {
            "num_suffix_layers: 1": "num_suffix_layers: 0",
            "mode: meta": "mode: 'off'",
        },
    }
    for number, (said, changes) in enumerate(others.items()):
        copy = tmp_path / f"step-{number:08d}"
        shutil.copytree(checkpoint, copy)
        recipe = (copy / "run.yaml").read_text()
        for old, new in changes.items():
            assert old in recipe
            recipe = recipe.replace(old, new)
        (copy / "run.yaml").write_text(recipe)
        (copy / "manifest.json").unlink()
        write_manifest(copy)
        with pytest.raises(UserError, match=said):
            load_learner(copy)
