"""Later stages, and a plain model extended into one that learns while it reads."""

from pathlib import Path

import pytest
import torch
from small_run import losses, small_run

from ttt_megatron.config import InnerConfig
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.training.initial_weights import start_from
from ttt_megatron.training.run import run_training
from ttt_megatron.training.weights import build_learner, load_learner

PLAIN = {"model__num_suffix_layers": 0, "inner__mode": "off"}


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a plain model's run. Read only."""
    output = tmp_path_factory.mktemp("plain") / "run"
    run_training(small_run(data, output, **PLAIN))
    return output


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.randint(0, 257, (2, 33), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1], rows[:, 1:], torch.ones(2, 32, dtype=torch.bool)


def _extended(data: Path, plain: Path) -> Learner:
    learner = build_learner(small_run(data, plain))
    start_from([learner], plain)
    return learner


def test_an_extended_model_starts_as_the_plain_one(data: Path, plain: Path) -> None:
    original, _, _ = load_learner(plain)
    extended = _extended(data, plain)
    with torch.no_grad():
        loss = original(*_batch()).loss
        assert torch.equal(extended(*_batch(), inner_steps=False).loss, loss)
    # With inner steps the suffix runs chunk by chunk: equal but for rounding.
    torch.testing.assert_close(extended(*_batch(), 1.0).loss.detach(), loss, rtol=1e-6, atol=0)


def test_an_extended_model_learns_through_its_prime_mlps(data: Path, plain: Path) -> None:
    extended = _extended(data, plain)
    optimizer = torch.optim.AdamW(extended.parameters(), lr=1e-2)
    prime = dict(extended.named_parameters())["model.layers.1.prime_mlp.linear_fc1.weight"]
    drifts = []
    for _ in range(3):
        optimizer.zero_grad()
        output = extended(*_batch(), 1.0)
        output.loss.backward()
        optimizer.step()
        drifts.append(output.drift.mean().item())
    assert drifts[0] == 0.0
    assert drifts[2] > drifts[1] > 0.0
    assert prime.grad is not None
    assert prime.grad.abs().max() > 0


def test_a_later_stage_starts_from_the_weights_with_a_fresh_schedule(
    data: Path, tmp_path: Path
) -> None:
    first = small_run(data, tmp_path / "first")
    run_training(first)
    longer = small_run(
        data,
        tmp_path / "second",
        data__sequence_length=64,
        training__init_from=str(tmp_path / "first"),
        training__steps=2,
        training__save_interval=1,
        optimizer__warmup_fraction=0.5,
    )
    run_training(longer)
    # The first update has rate 0: the weights are still those of the first stage.
    before, _, _ = load_learner(tmp_path / "first")
    after, config, info = load_learner(tmp_path / "second/checkpoints/step-00000001")
    assert (info.step, config.data.sequence_length) == (1, 64)
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1] - 0.3


def test_unequal_shapes_are_named(data: Path, plain: Path, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        learner = build_learner(small_run(data, tmp_path, **changes))
        with pytest.raises(UserError) as caught:
            start_from([learner], plain)
        return str(caught.value)

    message = refused(model__ffn_hidden_size=32)
    assert "model.layers.0.mlp.linear_fc1.weight" in message
    assert "(48, 16)" in message
    assert "(64, 16)" in message
    assert "has no parameter model.layers.2." in refused(model__num_layers=3, **PLAIN)
    assert "that this model lacks" in refused(model__num_layers=1)


def test_prime_mlps_are_not_dropped_silently(data: Path, tmp_path: Path) -> None:
    run_training(small_run(data, tmp_path / "run", training__steps=1))
    plain = Learner(small_run(data, tmp_path, **PLAIN).model, InnerConfig(mode="off"))
    with pytest.raises(UserError, match="prime"):
        start_from([plain], tmp_path / "run")
