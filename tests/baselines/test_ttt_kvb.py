"""TTT-KVB layers against their definition, in pieces, and by what they are for."""

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from ttt_kvb_loop import loop

import ttt_kernels
from ttt_megatron.baselines.ttt_kvb import TTTKVB
from ttt_megatron.baselines.ttt_kvb_swa import SWATTTKVB
from ttt_megatron.baselines.ttt_kvb_work import (
    fast_parameters,
    initial_value,
    swa_ttt_kvb_parameters,
    ttt_kvb_flops,
    ttt_kvb_parameters,
)
from ttt_megatron.config import from_dict
from ttt_megatron.config.mixers import TTTKVBConfig
from ttt_megatron.config.schema import InnerConfig, ModelConfig, OptimizerConfig
from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner
from ttt_megatron.model.decay import decays
from ttt_megatron.model.slots import Slots
from ttt_megatron.serving.session import Session

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=12, num_heads=3, ffn_hidden_size=8, window_size=3, rope_theta=50.0
)
TTT_MLP = {"fast_mlp": "gelu", "loss": "squared", "expansion": 1.5}
LACT = {"fast_mlp": "swiglu", "loss": "dot", "expansion": 1.25, "output_rule": "previous"}
CASES = {
    "TTT-MLP": TTT_MLP,
    "TTT-MLP, clipped": {**TTT_MLP, "clip": 0.35, "rate": 2.0},
    "TTT-MLP, summed and clipped": {**TTT_MLP, "clip": 1.0, "rate": 2.0, "average": False},
    "TTT-MLP, previous": {**TTT_MLP, "output_rule": "previous", "clip": 2.5, "rate": 2.0},
    "TTT-MLP, simplified": {**TTT_MLP, "output_rule": "simplified", "rate_form": "constant"},
    "LaCT": {**LACT, "weight_norm": True, "rate_form": "softplus", "average": False},
    "LaCT, positions and heads": {**LACT, "positions": "absolute", "num_heads": 2},
    "LaCT, updated": {**LACT, "output_rule": "updated", "positions": "none"},
    "LaCT, updated and clipped": {**LACT, "output_rule": "updated", "clip": 0.7, "rate": 2.0},
    "SwiGLU, squared, one head": {
        **TTT_MLP,
        "fast_mlp": "swiglu",
        "num_heads": 1,
        "output_rule": "simplified",
        "weight_norm": True,
    },
}


def settings_of(name, **changes):
    return TTTKVBConfig(chunk_size=4, **{**CASES[name], **changes})


def config_of(name, config=CONFIG, **changes):
    return dataclasses.replace(config, ttt_kvb=settings_of(name, **changes))


def filled(module, dtype=torch.float64):
    """Every parameter drawn anew, so that none sits where it would hide an error."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.mul_(0.4).add_(1.0 if "norm" in name or "gain" in name else 0.0)
    return module.to(dtype)


def layer_of(name, config=CONFIG, **changes):
    return filled(TTTKVB(config_of(name, config, **changes), Slots()))


def inputs(rows=2, tokens=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, CONFIG.hidden_size, generator=generator, dtype=torch.float64)


def rotations(x, start=0):
    head_dim = CONFIG.hidden_size // CONFIG.num_heads
    return ttt_kernels.rotations(start, x.shape[1], head_dim, CONFIG.rope_theta, x)


def in_pieces(layer, x, size):
    outs, state, start = [], None, 0
    for piece in x.split(size, dim=1):
        out, state = layer(piece, rotations(piece, start), state)
        outs.append(out)
        start += piece.shape[1]
    return torch.cat(outs, dim=1), state


def gradients(out, layer, x):
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(out, (x, *parameters), cotangent)
    return dict(zip(("x", *names), found, strict=True))


def assert_same(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_values_and_all_gradients_are_the_loops(name):
    layer, x = layer_of(name), inputs().requires_grad_()
    reference = loop(layer, x)
    clip = layer.settings.clip
    assert not clip or min(reference.norms) < clip < max(reference.norms)
    expected = gradients(reference.out, layer, x)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    out, _ = layer(x, rotations(x), None)
    assert_same(out, reference.out, 1e-10)
    assert_same(gradients(out, layer, x), expected, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_any_size_equal_one_read(name):
    layer, x = layer_of(name), inputs().requires_grad_()
    whole, state = layer(x, rotations(x), None)
    expected = gradients(whole, layer, x)
    for size in (1, 3, 4, 7):
        out, after = in_pieces(layer, x, size)
        assert_same(out, whole, 1e-12)
        assert_same(tuple(after), tuple(state), 1e-12)
        assert_same(gradients(out, layer, x), expected, 1e-10)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_without_norms_of_queries_and_keys(qk_norm):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    layer, x = layer_of("TTT-MLP", config), inputs(rows=1, tokens=6)
    assert_same(layer(x, rotations(x), None)[0], loop(layer, x).out, 1e-10)


@pytest.mark.parametrize("rule", ["updated", "previous", "simplified"])
def test_a_token_is_seen_by_later_ones_from_when_the_rule_says(rule):
    layer, x = layer_of("TTT-MLP", output_rule=rule), inputs(rows=1)
    other = x.clone()
    other[:, 5] += 1.0
    change = layer(x, rotations(x), None)[0] - layer(other, rotations(x), None)[0]
    changed = change.abs().amax((0, 2)) > 1e-9
    # Token 5 is the second of its chunk, 4 … 7.
    expected = [5, 6, 7, 8, 9, 10] if rule == "updated" else [5, 8, 9, 10]
    assert changed.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("name", ["TTT-MLP, previous", "LaCT, positions and heads"])
def test_a_step_brings_back_the_values_of_its_keys(name):
    layer = layer_of(name, positions="none", clip=0.0, rate=0.5, num_heads=None)
    # With queries as keys, a text read twice asks the second time for what it bound the first.
    layer.linear_qkv.weight.data[:12] = layer.linear_qkv.weight.data[12:24]
    layer.q_layernorm.weight.data.copy_(layer.k_layernorm.weight.data)
    layer.out_layernorm = torch.nn.Identity()
    layer.linear_proj = torch.nn.Identity()
    x = inputs(tokens=4)
    read = layer(torch.cat((x, x), dim=1), rotations(torch.cat((x, x), dim=1)), None)[0]
    v = x @ layer.linear_qkv.weight[24:].T
    first, second = read.split(4, dim=1)
    if layer.settings.loss == "squared":
        assert (second - v).square().sum() < 0.9 * (first - v).square().sum()
    else:
        assert (second * v).sum() > (first * v).sum() + 1.0


@pytest.mark.parametrize("window", [1, 3, None])
@pytest.mark.parametrize("name", ["TTT-MLP", "LaCT"])
def test_after_attention(window, name):
    config = dataclasses.replace(CONFIG, window_size=window)
    layer = filled(SWATTTKVB(config_of(name, config), Slots()))
    x = inputs().requires_grad_()
    whole, state = layer(x, rotations(x), None)
    attended, _ = layer.attention(x, rotations(x), None)
    learnt, _ = layer.ttt(layer.ttt_norm(x + attended), rotations(x), None)
    assert_same(whole, attended + learnt, 1e-12)
    expected = gradients(whole, layer, x)
    for size in (1, 4, 7):
        out, after = in_pieces(layer, x, size)
        assert_same(out, whole, 1e-12)
        assert_same(tuple(after), tuple(state), 1e-12)
        assert_same(gradients(out, layer, x), expected, 1e-10)
    assert state.k.shape[1] == (11 if window is None else window - 1)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in state)


def test_a_model_reads_in_pieces_what_it_reads_at_once():
    config = dataclasses.replace(
        CONFIG,
        num_layers=3,
        num_suffix_layers=0,
        mixers="swa_ttt_kvb, attention, ttt_kvb",
        init_std=0.3,
    )

    def layer(kind, name):
        return lambda config, slots: kind(config_of(name, config), slots)

    mixers = {
        "ttt_kvb": layer(TTTKVB, "TTT-MLP"),
        "swa_ttt_kvb": layer(SWATTTKVB, "LaCT"),
    }
    slots = Slots(mixers=mixers)
    learner = Learner(config, InnerConfig(mode="off"), dtype=torch.float64, slots=slots)
    tokens = torch.randint(1, 11, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = learner.model.logits(learner.run_prefix(tokens))
    for size in (1, 5, 11):
        session = Session(learner, 2)
        read = [session.read(piece) for piece in tokens.split(size, dim=1)]
        assert_same(torch.cat(read, dim=1), expected, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_layer(name):
    config = config_of(name)
    layer = layer_of(name)
    assert ttt_kvb_parameters(config) == sum(p.numel() for p in layer.parameters())
    both = SWATTTKVB(config, Slots())
    assert swa_ttt_kvb_parameters(config) == sum(p.numel() for p in both.parameters())
    x = inputs(rows=1, tokens=8)
    with FlopCounterMode(display=False) as counter:
        _, state = layer(x, rotations(x), None)
    assert state.fast[0].numel() == fast_parameters(config)
    flops = ttt_kvb_flops(config)
    # Whole squares of tokens are multiplied here, of which (4 + 1) / 2 in 4 are needed.
    computed = flops.linear + flops.fast + flops.within * 4 / 2.5
    assert counter.get_total_flops() == pytest.approx(8 * computed, rel=1e-3)


def test_initial_values():
    settings = settings_of("LaCT")
    generator = torch.Generator().manual_seed(0)
    layer = TTTKVB(config_of("LaCT"), Slots())
    own = {
        name
        for name, part in layer.named_parameters()
        if initial_value(f"layers.0.mixer.{name}", part.shape, generator, settings) is not None
    }
    assert own == {"fast_fc1", "fast_fc2", "rate_bias"}
    matrix = initial_value("a.fast_fc1", torch.Size((4, 50, 25)), generator, settings)
    assert matrix.std().item() == pytest.approx(0.2, rel=0.05)
    other = settings_of("TTT-MLP")
    assert initial_value("a.fast_fc1", matrix.shape, generator, other) is None
    assert torch.equal(initial_value("a.binding_gain", (2, 3), generator, other), torch.ones(2, 3))
    assert not initial_value("a.fast_bias2", (2, 3), generator, other).any()


@pytest.mark.parametrize("name", CASES)
def test_only_matrices_decay_where_only_matrices_shall(name):
    layer = layer_of(name)
    config = OptimizerConfig(decay="matrices")
    kept = {n for n, parameter in layer.named_parameters() if not decays(parameter, config)}
    names = {n for n, _ in layer.named_parameters()}
    assert kept == {n for n in names if re.search(r"gain|bias|layernorm", n)}
    assert all(decays(parameter, OptimizerConfig()) for parameter in layer.parameters())


def test_bfloat16_keeps_fast_weights_in_float32():
    layer = layer_of("TTT-MLP, clipped").float()
    x = inputs().float()
    exact, _ = layer(x, rotations(x), None)
    rounded, state = layer(x.bfloat16(), rotations(x), None)
    assert rounded.dtype == torch.bfloat16
    assert state.fast.dtype == state.total.dtype == torch.float32
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_nothing_to_learn_has_finite_gradients():
    layer = layer_of("LaCT, updated and clipped")
    layer.linear_qkv.weight.data.zero_()
    x = inputs().requires_grad_()
    out, _ = layer(x, rotations(x), None)
    assert all(found.isfinite().all() for found in gradients(out, layer, x).values())


def run_of(mixers, settings):
    model = {"hidden_size": 12, "num_heads": 3, "num_suffix_layers": 0, "mixers": mixers}
    return {"model": {**model, "ttt_kvb": settings}, "inner": {"mode": "off"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fast_mlp": "relu"}, "fast_mlp must be one of gelu, swiglu, not 'relu'"),
        ({"num_heads": 5}, "num_heads = 5 does not divide model.hidden_size = 12"),
        ({"num_heads": 4}, "turns pairs, and 4 heads are 3 wide"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"expansion": 0.1}, "expansion = 0.1"),
        ({"rate": 0.0}, "rate = 0.0"),
        ({"rate": float("inf")}, "rate must be a number, not inf"),
        ({"clip": -1.0}, "clip = -1.0"),
        ({"weight_norm": True}, "output_rule = previous or simplified"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        from_dict(run_of("attention, swa_ttt_kvb", changes))


@pytest.mark.parametrize("changes", [{"num_heads": 5}, {"weight_norm": True}])
def test_models_without_such_layers_are_not_asked(changes):
    from_dict(run_of("attention", changes))


def test_what_a_layer_refuses():
    with pytest.raises(ValueError, match="not cut into parts"):
        TTTKVB(CONFIG, Slots(parts=2))
    layer, x = layer_of("TTT-MLP"), inputs()
    _, state = layer(x, rotations(x), None)
    ragged = state._replace(seen=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="one place of their chunks"):
        layer(x, rotations(x), ragged)
