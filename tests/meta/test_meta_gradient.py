"""The engine's meta-gradient against reverse over reverse, and its structure."""

import pytest
import torch
from meta_case import (
    batch,
    engine_gradients,
    gradients,
    learner,
    oracle_gradients,
    worst_error,
)

from ttt_megatron.meta.substitute import suffix_parameters

MODELS = {
    "two suffix blocks": {},
    "one suffix block": {"num_suffix_layers": 1},
    "no block before the suffix": {"num_layers": 2},
    "grouped queries": {"num_kv_heads": 2},
    "untied head": {"tie_embeddings": False},
    "full attention": {"window_size": None},
    "window of one chunk": {"window_size": 4},
    "prime MLP of another width": {"prime_ffn_hidden_size": 20},
    "no norms after sublayers": {"post_norm": False},
    "no norms of queries and keys": {"qk_norm": False, "post_norm": False},
}
INNER_LOOPS = {
    "some steps clipped": {},
    "every step clipped": {"clip": 1e-3},
    "no clip": {"clip": 0.0, "lr": 0.5},
    "first order": {"mode": "first_order"},
    "one chunk": {"chunk_size": 24},
    "one token a chunk": {"chunk_size": 1, "clip": 0.05},
}
POLICIES = {
    "save_activations": {"memory_policy": "save_activations"},
    "save_all": {"memory_policy": "save_all"},
    "two levels": {"two_level": True},
    "two levels, uneven": {"two_level": True, "segment_chunks": 3},
    "two levels, save_all": {"two_level": True, "memory_policy": "save_all"},
}


def assert_engine_equals_oracle(model, data=None):
    data = data or batch()
    output = model(*data)
    output.loss.backward()
    actual = gradients(model)
    result, expected = oracle_gradients(model, data)
    torch.testing.assert_close(output.loss, result.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.chunk_losses, result.chunk_losses, rtol=1e-12, atol=0)
    assert worst_error(actual, expected) < 1e-10


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    assert_engine_equals_oracle(learner(model=MODELS[case]))


@pytest.mark.parametrize("case", INNER_LOOPS)
def test_inner_loops(case):
    assert_engine_equals_oracle(learner(inner=INNER_LOOPS[case]))


@pytest.mark.parametrize("case", POLICIES)
def test_memory_policies(case):
    assert_engine_equals_oracle(learner(inner=POLICIES[case]))


def test_recomputed_prefix():
    assert_engine_equals_oracle(learner(recompute_prefix=True))


def test_cases_are_second_order_indeed():
    """With these settings a first-order gradient misses by far: the tests above would see it."""
    exact = engine_gradients(learner(), batch())
    first_order = engine_gradients(learner(inner={"mode": "first_order"}), batch())
    assert worst_error(first_order, exact) > 0.1


def test_clipping_is_active_on_some_chunks_only():
    norms = learner()(*batch()).inner_grad_norms
    assert (norms > 2).any()
    assert (norms < 2).any()


def test_fully_masked_chunk_takes_no_step_and_leaves_finite_gradients():
    tokens, targets, mask = batch()
    mask[1, 4:8] = False
    model = learner()
    assert_engine_equals_oracle(model, (tokens, targets, mask))
    with torch.no_grad():
        output = model(tokens, targets, mask)
    assert output.inner_grad_norms[1, 1] == 0
    assert output.chunk_losses[1, 1] == 0


def test_sequences_of_a_batch_do_not_touch_each_other():
    model = learner()
    together = engine_gradients(model, batch())
    alone = [engine_gradients(model, tuple(x[i : i + 1] for x in batch())) for i in range(3)]
    mean = {name: sum(g[name] for g in alone) / 3 for name in together}
    assert worst_error(together, mean) < 1e-12


def test_policies_agree_in_float32():
    expected = engine_gradients(learner(), batch())
    for inner in ({}, *POLICIES.values()):
        single = engine_gradients(learner(inner=inner, dtype=torch.float32), batch())
        doubled = {name: value.double() for name, value in single.items()}
        assert worst_error(doubled, expected) < 2e-4


def test_bfloat16_keeps_fast_weights_and_gradients_in_float32():
    calm = {"lr": 0.05}
    model = learner(inner=calm, dtype=torch.float32, compute_dtype=torch.bfloat16)
    exact = engine_gradients(learner(inner=calm), batch())
    output = model(*batch())
    output.loss.backward()
    found = gradients(model)
    assert all(g.dtype == torch.float32 for g in found.values())
    similarity = torch.cosine_similarity(
        torch.cat([g.flatten().double() for g in found.values()]),
        torch.cat([exact[name].flatten() for name in found]),
        dim=0,
    )
    assert similarity > 0.95
    with torch.no_grad():
        fast = model(*batch()).fast_weights
    assert all(w.dtype == torch.float32 for w in fast)


def test_inner_gradient_of_zero_rate_gives_the_plain_gradient():
    """With lr = 0 the meta loss is the plain loss: both paths through the code must agree."""
    meta, plain = learner(), learner(inner={"mode": "off"})
    data = batch()
    meta(*data, 0.0).loss.backward()
    assert worst_error(gradients(meta), engine_gradients(plain, data)) < 1e-10


def test_every_hook_fires_once_per_backward():
    """Data-parallel reduction counts on it, the tied embedding included."""
    model = learner()
    calls: dict[str, int] = {}

    def count(name):
        def hook(_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    model(*batch()).loss.backward()
    assert calls == dict.fromkeys(dict(model.named_parameters()), 1)


def test_parameters_are_back_in_place_after_a_step():
    model = learner()
    before = {name: id(p) for name, p in model.named_parameters()}
    model(*batch()).loss.backward()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(isinstance(s.tensor, torch.nn.Parameter) for s in suffix_parameters(model.model))


def test_scaled_loss_scales_the_gradient():
    """Gradient accumulation divides the loss: the tangent terms must follow."""
    model, data = learner(), batch()
    expected = engine_gradients(model, data)
    (model(*data).loss * 0.25).backward()
    quarter = {name: 4 * value for name, value in gradients(model).items()}
    assert worst_error(quarter, expected) < 1e-12


def test_numerical_derivative():
    """Against finite differences of the evaluation loss, which shares no backward code."""
    model, data = learner(), batch()
    analytic = engine_gradients(model, data)
    generator = torch.Generator().manual_seed(3)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }

    @torch.no_grad()
    def loss_at(step):
        for name, p in model.named_parameters():
            p.add_(direction[name], alpha=step)
        value = model(*data).loss
        for name, p in model.named_parameters():
            p.sub_(direction[name], alpha=step)
        return value

    h = 1e-7
    numeric = (loss_at(h) - loss_at(-h)) / (2 * h)
    exact = sum((analytic[n] * direction[n]).sum() for n in analytic)
    assert float(abs(numeric - exact) / abs(exact)) < 1e-5
