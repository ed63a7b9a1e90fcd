"""What we hand to TransformerEngine and take from it, through its interface; its kernels need CUDA.

With delayed scales it must do what our own products do: the scales are ours.
"""

import sys

import fake_transformer_engine as fake
import pytest
import torch
from meta_case import batch, engine_gradients, learner, worst_error

from ttt_kernels import CurrentScaling, DelayedScaling
from ttt_megatron.model.float8 import Float8Product, float8_layers
from ttt_megatron.parallel import te_layers
from ttt_megatron.parallel.te_layers import TransformerEngineProduct

SHAPE = {"hidden_size": 32, "ffn_hidden_size": 48}
INNER = {"lr": 0.5}


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr(te_layers, "transformer_engine", lambda: fake)
    monkeypatch.setitem(sys.modules, "transformer_engine", fake)
    monkeypatch.setitem(sys.modules, "transformer_engine.common", fake)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", fake)


def theirs(layer):
    return TransformerEngineProduct(layer, DelayedScaling(steps=3))


def ours(layer):
    return Float8Product(DelayedScaling(steps=3))


def scalings(model):
    return [layer.float8.scaling for layer in float8_layers(model.model).values()]


@pytest.mark.parametrize("policy", ["recompute", "save_activations"])
@pytest.mark.parametrize("recompute_prefix", [False, True])
def test_delayed_scales_are_ours(policy, recompute_prefix):
    inner = INNER | {"memory_policy": policy}
    settings = {"recompute_prefix": recompute_prefix}
    models = [learner(SHAPE, inner, float8=make, **settings) for make in (theirs, ours)]
    plain = learner(SHAPE, inner)
    for step in range(3):
        data = batch(seed=step)
        found, expected = (engine_gradients(model, data) for model in models)
        assert worst_error(found, expected) < 1e-10
        assert worst_error(engine_gradients(plain, data), expected) > 0.01
        for a, b in zip(*map(scalings, models), strict=True):
            torch.testing.assert_close(a.pending, b.pending, rtol=1e-5, atol=0)
            assert (a.pending > 0).any()
            for scaling in (a, b):
                scaling.advance(b.pending.clone())
    # Scales of a history, not of the tensors at hand.
    assert all((s.exponents > -1000).any() for s in scalings(models[0]))


def test_current_scales_come_as_close_as_ours():
    exact, found, own = (
        torch.cat([g.flatten() for g in engine_gradients(model, batch()).values()])
        for model in (
            learner(SHAPE, INNER),
            learner(SHAPE, INNER, float8=TransformerEngineProduct),
            learner(SHAPE, INNER, float8=lambda _: Float8Product(CurrentScaling())),
        )
    )
    away = [float((g - exact).norm() / exact.norm()) for g in (found, own)]
    assert 0.01 < away[0] < 1.5 * away[1]


def test_what_is_not_finite_stays_so():
    layer = torch.nn.Linear(32, 16, bias=False)
    product = theirs(layer)
    for wrong in (torch.nan, torch.inf):
        x = torch.ones(2, 32)
        x[1, 3] = wrong
        assert not product(x, layer.weight).isfinite().any()
        x = torch.ones(2, 32, requires_grad=True)
        product(x, layer.weight).backward(torch.full((2, 16), wrong))
        assert not x.grad.isfinite().any()
    assert product.scaling.pending.isfinite().all()


def test_no_weight_of_theirs_is_a_parameter():
    model = learner(SHAPE, INNER, float8=theirs)
    assert dict(model.named_parameters()).keys() == dict(learner(SHAPE).named_parameters()).keys()
