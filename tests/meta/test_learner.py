"""Training, evaluation and plain runs of one learner; causality."""

import pytest
import torch
from meta_case import batch, learner


@torch.no_grad()
def nll(model, data, **options):
    return model(*data, **options).token_nll


def test_evaluation_equals_training_bitwise():
    model, data = learner(), batch()
    trained = model(*data)
    with torch.no_grad():
        evaluated = model(*data)
    assert torch.equal(trained.token_nll, evaluated.token_nll)
    torch.testing.assert_close(trained.loss, evaluated.loss, rtol=1e-14, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", [1, 8, 13, 23])
def test_a_token_changes_nothing_before_it(training, position):
    model, (tokens, targets, mask) = learner(), batch()
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 19
    changed_targets = targets.clone()
    changed_targets[:, position - 1] = changed[:, position]
    with torch.set_grad_enabled(training):
        before = model(tokens, targets, mask).token_nll
        after = model(changed, changed_targets, mask).token_nll
    assert torch.equal(before[:, : position - 1], after[:, : position - 1])
    assert not torch.equal(before[:, position:], after[:, position:])


@torch.no_grad()
def test_logits_before_a_changed_token_are_bitwise_the_same():
    model, (tokens, targets, mask) = learner(), batch()
    chunks = tuple(range(6))
    for position in (3, 4, 14):
        changed, changed_targets = tokens.clone(), targets.clone()
        changed[:, position] = changed_targets[:, position - 1] = (tokens[:, position] + 1) % 19
        logits = [
            torch.cat([model(*data, logits_of=chunks).logits[c] for c in chunks], dim=1)
            for data in ((tokens, targets, mask), (changed, changed_targets, mask))
        ]
        assert torch.equal(logits[0][:, :position], logits[1][:, :position])
        assert not torch.equal(logits[0][:, position], logits[1][:, position])


def test_modes_differ_where_they_should():
    data = batch()
    losses = {}
    for mode in ("meta", "first_order", "naive", "off"):
        model = learner(inner={"mode": mode})
        with torch.no_grad():
            evaluated = model(*data).loss
        losses[mode] = (float(model(*data).loss.detach()), float(evaluated))
    stepped, plain = losses["meta"][1], losses["off"][1]
    assert abs(stepped - plain) > 1e-3
    assert losses["meta"] == pytest.approx((stepped, stepped))
    assert losses["first_order"] == pytest.approx((stepped, stepped))
    assert losses["naive"] == pytest.approx((plain, stepped))
    assert losses["off"] == pytest.approx((plain, plain))


def test_first_chunk_does_not_know_of_inner_steps():
    model, data = learner(), batch()
    on, off = nll(model, data, inner_steps=True), nll(model, data, inner_steps=False)
    torch.testing.assert_close(on[:, :4], off[:, :4], rtol=1e-12, atol=0)
    assert not torch.allclose(on[:, 4:], off[:, 4:], rtol=1e-3)


@torch.no_grad()
def test_a_partial_last_chunk_is_read_without_a_step():
    model, (tokens, targets, mask) = learner(), batch()
    whole = model(tokens, targets, mask, final_step=True)
    part = model(tokens[:, :22], targets[:, :22], mask[:, :22], final_step=True)
    torch.testing.assert_close(part.token_nll, whole.token_nll[:, :22], rtol=1e-12, atol=0)
    assert whole.inner_grad_norms.shape == (3, 6)
    assert part.inner_grad_norms.shape == (3, 5)


@torch.no_grad()
def test_one_step_moves_the_fast_weights_by_at_most_rate_times_clip():
    model = learner(inner={"chunk_size": 24, "clip": 0.01, "lr": 3.0})
    output = model(*batch(), final_step=True)
    initial = [p for n, p in model.named_parameters() if n in model.fast_parameter_names]
    pairs = zip(output.fast_weights, initial, strict=True)
    moved = sum((w - start).square().sum((1, 2)) for w, start in pairs).sqrt()
    expected = torch.full((3,), 0.03, dtype=torch.float64)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=0)
