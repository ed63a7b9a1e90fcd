"""Mamba 2 and Gated DeltaNet as modules: pieces, rows, dtypes, gradients, counts."""

import pytest
import torch
from mixer_case import CONFIG, KINDS, draw_hidden, mixer_of, read_in_pieces, worst
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ttt_megatron.baselines import MIXER_MODULES
from ttt_megatron.baselines.initial_values import initial_value
from ttt_megatron.baselines.work import (
    gated_delta_flops,
    gated_delta_parameters,
    mamba2_flops,
    mamba2_parameters,
)
from ttt_megatron.config import from_dict
from ttt_megatron.config.mixers import GatedDeltaConfig, Mamba2Config
from ttt_megatron.config.schema import ModelConfig, OptimizerConfig
from ttt_megatron.errors import UserError
from ttt_megatron.model.decay import decays
from ttt_megatron.model.slots import Slots

COUNTS = {
    "mamba2": (mamba2_parameters, mamba2_flops),
    "gated_delta": (gated_delta_parameters, gated_delta_flops),
}


@pytest.mark.parametrize("sizes", [[1] * 9, [1, 2, 6], [4, 5], [70, 1, 66], [64, 73]])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_what_the_whole_gives(kind, sizes):
    """Outputs, the state that is left, and gradients through it."""
    mixer, x = mixer_of(kind), draw_hidden(2, sum(sizes)).requires_grad_()
    leaves = [x, *mixer.parameters()]
    results = []
    for cut in ([x.shape[1]], sizes):
        out, state = read_in_pieces(mixer, x, cut)
        loss = (out.square().sum() + out[:, -1].sum()) / x.shape[1]
        results.append([out, *state, *torch.autograd.grad(loss, leaves)])
    assert worst(results[1], results[0]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_later_tokens(kind):
    mixer, x = mixer_of(kind), draw_hidden(1, 9)
    changed = x.clone()
    changed[:, 6:] += 1.0
    before, after = (mixer(given, None, None)[0] for given in (x, changed))
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_state_go_on_by_themselves(kind):
    mixer, x = mixer_of(kind), draw_hidden(3, 8)
    with torch.no_grad():
        whole = mixer(x, None, None)[0]
        state = mixer(x[:, :5], None, None)[1]
        assert not any(part.requires_grad for part in state)
        chosen = torch.tensor([2, 0])
        rows = type(state)(*(part.index_select(0, chosen) for part in state))
        out = mixer(x[chosen, 5:], None, rows)[0]
    assert worst([out], [whole[chosen, 5:]]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_does_not_grow(kind):
    """Nor does it hold on to the memory of all tokens read."""
    mixer = mixer_of(kind)
    with torch.no_grad():
        states = [mixer(draw_hidden(2, length), None, None)[1] for length in (1, 200)]
    for short, long in zip(*states, strict=True):
        assert short.shape == long.shape
        assert long.untyped_storage().nbytes() == long.numel() * long.element_size()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_its_memory_in_float32(kind):
    exact, x = mixer_of(kind), draw_hidden(2, 100)
    rounded = mixer_of(kind, dtype=torch.float32)
    expected = exact(x, None, None)[0]
    out, state = rounded(x.bfloat16(), None, None)
    assert (out.dtype, state.inputs.dtype, state.memory.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert worst([out.double()], [expected]) < 3e-2
    whole = rounded(x.float(), None, None)[0]
    assert worst([whole.double()], [expected]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_module_gradients_are_those_of_finite_differences(kind):
    """Of inputs, the state before and every parameter."""
    config = ModelConfig(
        hidden_size=4,
        num_heads=2,
        init_std=0.4,
        mamba2=Mamba2Config(head_dim=4, state_size=2, conv_kernel=2),
        gated_delta=GatedDeltaConfig(expand_v=1, conv_kernel=2),
    )
    mixer = mixer_of(kind, config)
    x = draw_hidden(1, 6, width=4)
    with torch.no_grad():
        past = mixer(x[:, :3], None, None)[1]
    names = [name for name, _ in mixer.named_parameters()]

    def run(x, inputs, memory, *values):
        given = (x, None, type(past)(inputs, memory))
        out, state = functional_call(mixer, dict(zip(names, values, strict=True)), given)
        return out, *state

    given = [x[:, 3:], *past, *(p.detach() for p in mixer.parameters())]
    leaves = [t.clone().requires_grad_() for t in given]
    # Along random directions: every parameter by itself would take seconds.
    assert gradcheck(run, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 192])
def test_parameters_are_counted_from_the_shapes(kind, width):
    config = ModelConfig(hidden_size=width, num_heads=4)
    mixer = MIXER_MODULES[kind](config, Slots())
    assert COUNTS[kind][0](config) == sum(p.numel() for p in mixer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_products_made(kind):
    """PyTorch's counter sees matrix products; the convolution and the solving are neither."""
    config = ModelConfig(hidden_size=64, num_heads=4)
    mixer, tokens = mixer_of(kind, config, torch.float32), 2 * 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(draw_hidden(2, tokens, 64, torch.float32), None, None)
    flops = COUNTS[kind][1](config)
    assert counter.get_total_flops() == 2 * tokens * (flops.linear + flops.recurrence)
    assert flops.total == flops.linear + flops.recurrence + flops.convolution + flops.solve


def drawn(name, shape, seed):
    return initial_value(name, torch.Size(shape), torch.Generator().manual_seed(seed))


def test_initial_values_are_in_the_ranges_of_the_sources():
    decay = drawn("layers.0.mixer.A_log", [1000], 1).exp()
    step = torch.nn.functional.softplus(drawn("layers.0.mixer.dt_bias", [1000], 1))
    weight = drawn("layers.0.mixer.convolution.weight", [1000, 4], 1)
    for values, low, high in ((decay, 1, 16), (step, 1e-3, 1e-1), (weight, -0.5, 0.5)):
        assert low * (1 - 1e-4) - 1e-6 <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high * (1 + 1e-4)
    # Time steps are spread evenly over their exponents.
    assert 0.4 < (step < 1e-2).float().mean() < 0.6
    assert torch.equal(drawn("mixer.D", [3], 1), torch.ones(3))
    assert torch.equal(drawn("mixer.convolution.bias", [3], 1), torch.zeros(3))
    assert drawn("layers.0.mixer.linear_in.weight", [3, 2], 1) is None


def test_initial_values_depend_on_the_seed_alone():
    first, again, other = (drawn("mixer.A_log", [5], seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_refused(kind):
    with pytest.raises(ValueError, match="not cut into parts, and there are 2"):
        MIXER_MODULES[kind](CONFIG, Slots(parts=2))


def test_a_width_that_heads_do_not_divide_is_refused():
    shape = {"hidden_size": 40, "num_heads": 4, "num_suffix_layers": 0, "mixers": "mamba2"}
    with pytest.raises(UserError, match=r"mamba2\.head_dim = 64 .*hidden_size = 40; .* of 80"):
        from_dict({"model": shape, "inner": {"mode": "off"}})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_rates_and_steps_never_decay(kind, decay):
    mixer = MIXER_MODULES[kind](CONFIG, Slots()).to(torch.bfloat16)
    config = OptimizerConfig(decay=decay)
    kept = {name for name, p in mixer.named_parameters() if not decays(p, config)}
    own = {"A_log", "dt_bias", "D"} & {name for name, _ in mixer.named_parameters()}
    vectors = {name for name, p in mixer.named_parameters() if p.ndim < 2}
    assert kept == (own if decay == "all" else vectors)
