"""The meta gradient with static linear maps in float8: exact as defined, close to float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import ttt_kernels
from tests.meta.meta_case import (
    batch,
    engine_gradients,
    gradients,
    learner,
    oracle_gradients,
    worst_error,
)
from tests.meta.test_no_sync import NoWaiting
from ttt_kernels import CurrentScaling, DelayedScaling
from ttt_kernels.fp8_linear.scaling import ROLES
from ttt_megatron.meta.chunk_graph import ChunkPrograms
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.float8 import Float8Product, float8_layers

SHAPE = {"hidden_size": 32, "ffn_hidden_size": 48}
WAYS = pytest.mark.parametrize("rowwise", [False, True], ids=["tensor", "row"])

# A power of two: what float8 makes of a tangent's cotangent, −lr times an adjoint, is then −lr
# times what it made of the adjoint.
INNER = {"lr": 0.5}


def current(layer: torch.nn.Module, rowwise: bool = False) -> Float8Product:
    return Float8Product(CurrentScaling(rowwise=rowwise))


def float8_learner(
    make: Callable[[torch.nn.Module], Float8Product], inner: dict | None = None, **settings
) -> Learner:
    return learner(SHAPE, INNER | (inner or {}), float8=make, **settings)


@WAYS
@pytest.mark.parametrize(
    ("clip", "policy"),
    [(2.0, "recompute"), (2.0, "save_activations"), (2.0, "save_all"), (0.0, "recompute")],
)
def test_engine_and_oracle_agree_on_what_float8_makes_of_a_model(rowwise, clip, policy):
    model = float8_learner(
        partial(current, rowwise=rowwise), {"clip": clip, "memory_policy": policy}
    )
    data = batch()
    found = engine_gradients(model, data)
    result, expected = oracle_gradients(model, data)
    assert worst_error(found, expected) < 1e-12
    assert abs(float(model(*data).loss.detach() - result.loss.detach())) < 1e-12
    full = learner(SHAPE, INNER | {"clip": clip})
    assert worst_error(engine_gradients(full, data), expected) > 0.01


def test_a_loss_of_any_scale_has_the_same_gradient():
    """Tangents and cotangents shrink with the loss; with scales of their own nothing is lost."""
    data = batch()

    class OneScale(Float8Product):
        """Value and tangent as twice the tokens of one tensor."""

        def pair(self, pair, weight, primal=None, dot_adjoint=None):
            return ttt_kernels.fp8_linear(pair, weight, self.scaling, self.rounded(weight))

    found = {}
    for name, make in (("own", current), ("shared", lambda _: OneScale(CurrentScaling()))):
        model = float8_learner(make)
        for scale in (1.0, 2.0**-18):
            (model(*data).loss * scale).backward()
            found[name, scale] = {n: g / scale for n, g in gradients(model).items()}
    small = 2.0**-18
    assert worst_error(found["own", small], found["own", 1.0]) < 1e-12
    # Without tangents that is a first-order gradient.
    assert worst_error(found["shared", small], found["shared", 1.0]) > 0.1


def delayed_learner(make: type[DelayedScaling] = DelayedScaling, **settings) -> Learner:
    """Its scales come from a step on other data."""
    model = float8_learner(lambda _: Float8Product(make(steps=2)), **settings)
    engine_gradients(model, batch(seed=11))
    for layer in float8_layers(model.model).values():
        layer.float8.scaling.advance()
    return model


class Restless(DelayedScaling):
    """Scales that move from tensor to tensor, not from step to step."""

    def round_sides(self, x, role, **sides):
        rounded = super().round_sides(x, role, **sides)
        self.exponents += 1
        return rounded


def test_delayed_scales_stay_between_a_sweep_and_its_recomputation():
    data = batch(seed=12)
    model = delayed_learner()
    layers = float8_layers(model.model)
    before = {name: layer.float8.scaling.exponents.clone() for name, layer in layers.items()}
    expected = engine_gradients(model, data)
    for name, layer in layers.items():
        assert layer.float8.scaling.exponents.equal(before[name])
        # All but what only the suffix has is seen in every layer.
        seen = layer.float8.scaling.pending > 0
        assert seen[ROLES.index("input")]
        assert seen[ROLES.index("cotangent")]
    for inner, settings in (
        ({"memory_policy": "save_activations"}, {}),
        ({"two_level": True, "segment_chunks": 2}, {}),
        ({}, {"recompute_prefix": True}),
    ):
        again = delayed_learner(inner=inner, **settings)
        assert worst_error(engine_gradients(again, data), expected) < 1e-12
    moving = engine_gradients(delayed_learner(Restless), data)
    kept = engine_gradients(
        delayed_learner(Restless, inner={"memory_policy": "save_activations"}), data
    )
    assert worst_error(moving, kept) > 1e-3


def test_delayed_scales_without_history_are_current_ones():
    data = batch()
    first = float8_learner(lambda _: Float8Product(DelayedScaling(steps=4)))
    assert (
        worst_error(engine_gradients(first, data), engine_gradients(float8_learner(current), data))
        < 1e-12
    )


@pytest.mark.parametrize("delayed", [False, True], ids=["current", "delayed"])
def test_passes_that_are_programs_see_weights_and_scales_of_every_step(delayed):
    """What a CUDA graph would repeat reads the rounded weights where they lie."""

    def make(layer: torch.nn.Module) -> Float8Product:
        return Float8Product(DelayedScaling(steps=2) if delayed else CurrentScaling())

    models = [float8_learner(make) for _ in range(2)]
    models[1].runner = ChunkPrograms()
    for step in range(2):
        found, expected = (engine_gradients(model, batch(seed=step)) for model in models)
        assert worst_error(found, expected) < 1e-12
        for model in models:
            for layer in float8_layers(model.model).values():
                if delayed:
                    layer.float8.scaling.advance()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
        if step == 0:
            made = models[1].runner.made
    assert models[1].runner.made == made > 0


@pytest.mark.parametrize("delayed", [False, True], ids=["current", "delayed"])
def test_the_host_reads_no_value(delayed):
    scaling = DelayedScaling(steps=2) if delayed else CurrentScaling()
    model = float8_learner(lambda _: Float8Product(scaling))
    tokens, targets, mask = batch()
    mask[:] = True
    with NoWaiting():
        model(tokens, targets, mask).loss.backward()


def test_a_weight_is_rounded_once_a_pass_and_anew_after_a_change(monkeypatch):
    counts = []
    fp8_weight = ttt_kernels.fp8_weight
    monkeypatch.setattr(
        ttt_kernels, "fp8_weight", lambda w, scaling: counts.append(w) or fp8_weight(w, scaling)
    )
    model, data = float8_learner(current), batch()
    layers = float8_layers(model.model)
    model(*data).loss.backward()
    assert len(counts) == len(layers) == 16
    first = gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            # As megatron-core's buffers do, behind autograd's back.
            parameter.data.mul_(1.5)
    changed = engine_gradients(model, data)
    fresh = float8_learner(current)
    fresh.load_state_dict(model.state_dict())
    assert worst_error(changed, engine_gradients(fresh, data)) < 1e-12
    assert worst_error(changed, first) > 0.01
    for layer in layers.values():
        layer.float8.hold()
    counts.clear()
    losses = [model(*data).loss for _ in range(2)]
    assert len(counts) == 16
    for loss in losses:
        loss.backward()


def test_what_is_not_finite_makes_no_finite_gradient():
    for name in ("layers.0.self_attention.linear_qkv", "layers.3.mlp.linear_fc2"):
        for bad in (torch.inf, torch.nan):
            model = float8_learner(current, dtype=torch.float32)
            with torch.no_grad():
                model.model.get_submodule(name).weight[1, 2] = bad
            loss = model(*batch()).loss
            loss.backward()
            norm = torch.stack([g.norm() for g in gradients(model).values()]).sum()
            assert not (loss.isfinite() and norm.isfinite())


def periodic(seed: int, size: int = 4, length: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences that repeat themselves, a tenth of their tokens replaced: worth reading."""
    generator = torch.Generator().manual_seed(seed)
    periods = torch.randint(3, 12, (size, 1), generator=generator)
    words = torch.randint(19, (size, 12), generator=generator)
    rows = words.gather(1, torch.arange(length + 1) % periods)
    other = torch.rand(rows.shape, generator=generator) < 0.1
    rows = torch.where(other, torch.randint(19, rows.shape, generator=generator), rows)
    return rows[:, :-1], rows[:, 1:], torch.ones(size, length, dtype=torch.bool)


TRAINED_SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "ffn_hidden_size": 48,
    "window_size": 16,
    "init_std": 0.18,
    "prime_init_std": 0.05,
}
TRAINED_INNER = {"chunk_size": 8, "lr": 1.0, "clip": 0.1}


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Weights of a small model after some steps of training in float32."""
    model = learner(TRAINED_SHAPE, TRAINED_INNER, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(25):
        optimizer.zero_grad()
        model(*periodic(step)).loss.backward()
        optimizer.step()
    return model.state_dict()


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g[name].double().flatten() for name in expected]) for g in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("way", ["tensor", "row", "delayed"])
def test_a_trained_models_meta_gradient_is_close_to_float64s(trained, way):
    def gradient(dtype: torch.dtype, make=None) -> dict[str, Tensor]:
        model = learner(TRAINED_SHAPE, TRAINED_INNER, dtype=dtype, float8=make)
        model.load_state_dict(trained)
        if way == "delayed" and make is not None:
            engine_gradients(model, periodic(98))
            for layer in float8_layers(model.model).values():
                layer.float8.scaling.advance()
        return engine_gradients(model, periodic(99))

    make = {
        "tensor": current,
        "row": partial(current, rowwise=True),
        "delayed": lambda _: Float8Product(DelayedScaling(steps=4)),
    }[way]
    found, expected = gradient(torch.float32, make), gradient(torch.float64)
    assert cosine(found, expected) > 0.99
    for group in ("prime_mlp.", "self_attention.linear", ".mlp.linear", "embedding", "norm"):
        names = [name for name in expected if group in name]
        assert cosine({n: found[n] for n in names}, {n: expected[n] for n in names}) > 0.98, group
