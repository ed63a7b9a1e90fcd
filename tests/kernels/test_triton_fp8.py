"""Rounding to float8 in Triton: bit for bit what PyTorch makes of the same numbers."""

from unittest.mock import patch

import pytest
import torch
from triton_runs import DEVICES

import ttt_kernels
from ttt_kernels import CurrentScaling
from ttt_kernels.fp8_linear import float8
from ttt_kernels.fp8_linear.float8 import E4M3, E5M2, Float8, History, multiply, round_sides

pytestmark = pytest.mark.parametrize("device", DEVICES)
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def spread(*shape, source=torch.float32, device="cpu", seed=0):
    """Numbers over more powers of two than float8 has."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.exp2(8 * torch.randn(shape, generator=generator))).to(device, source)


def in_torch(*arguments, **settings):
    """The same without Triton."""
    with patch.object(float8, "suits_triton", lambda x: False):
        return round_sides(*arguments, **settings)


def assert_equal(found: list[Float8], expected: list[Float8]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.data.dtype == other.data.dtype
        assert one.data.view(torch.uint8).equal(other.data.view(torch.uint8))
        torch.testing.assert_close(one.inverse, other.inverse, rtol=0, atol=0, equal_nan=True)


@FORMATS
@pytest.mark.parametrize("rowwise", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("rows", [1, 37, 80])
def test_both_sides_in_every_dtype(dtype, rowwise, rows, device):
    for source in (torch.float32, torch.bfloat16, torch.float16):
        x = spread(rows, 96, device=device).clamp(-6e4, 6e4).to(source)
        for straight, turned in ((True, True), (True, False), (False, True)):
            settings = {"straight": straight, "turned": turned, "rowwise": rowwise}
            found = round_sides(x, dtype, **settings)
            assert_equal(found, in_torch(x, dtype, **settings))
        assert found[0].data.shape == (96, rows + -rows % 16)


@FORMATS
def test_every_number_of_either_format_and_halfway_between(dtype, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()
    values = codes[codes.isfinite()].sort().values
    # The largest value is among them, so that the scale is 1.
    ties = (values[1:] + values[:-1]) / 2
    above, below = (torch.nextafter(ties, torch.full_like(ties, s)) for s in (1e9, -1e9))
    x = torch.cat([values, ties, above, below])[None]
    [rounded] = round_sides(x, dtype)
    assert rounded.inverse == 1
    assert_equal([rounded], in_torch(x, dtype))


@FORMATS
@pytest.mark.parametrize("power", [-1000, -3, 0, 9])
def test_scales_of_past_steps(dtype, power, device):
    x = spread(20, 48, device=device)
    x[3, 4] = 3000.0
    found = []
    for ways in (round_sides, in_torch):
        given = torch.tensor(power, dtype=torch.int32, device=device)
        history = History(given, torch.tensor(7.0, device=device))
        found.append(ways(x, dtype, turned=True, history=history))
        assert history.pending == x.abs().max()
        ways(x * 1e-9, dtype, history=history)
        ways(x * torch.inf, dtype, history=history)
        assert history.pending == x.abs().max()
    assert_equal(*found)


def test_zeros_tiny_and_strided_numbers(device):
    whole = spread(40, 128, device=device)
    for x in (
        whole[:, ::4],
        whole[3:29, 32:64],
        whole.t()[:32],
        whole[:, :32] * 0,
        whole[:, :32].sign() * 1e-45,
        whole[:, :32].sign() * 3e38,
    ):
        for rowwise in (False, True):
            found = round_sides(x, E4M3, turned=True, rowwise=rowwise)
            assert_equal(found, in_torch(x, E4M3, turned=True, rowwise=rowwise))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scales_tell_of_what_is_not_finite(bad, device):
    x = spread(16, 32, device=device)
    x[5, 6] = bad
    [one, turned] = round_sides(x, E4M3, turned=True)
    assert one.inverse.isnan()
    assert turned.inverse.isnan()
    [one, turned] = round_sides(x, E4M3, turned=True, rowwise=True)
    assert one.inverse.isnan().flatten().nonzero().tolist() == [[5]]
    assert turned.inverse.isnan().flatten().nonzero().tolist() == [[6]]


@pytest.mark.parametrize("rowwise", [False, True], ids=["tensor", "row"])
def test_the_map_and_its_pair_are_those_without_triton(rowwise, device):
    scaling = CurrentScaling(rowwise=rowwise)
    weight = spread(32, 48, seed=1, device=device).clamp(-4, 4).requires_grad_()
    pair = spread(2, 3, 7, 48, seed=2, device=device).clamp(-4, 4).bfloat16().requires_grad_()
    seed = spread(2, 3, 7, 32, seed=3, device=device).clamp(-4, 4).bfloat16()
    found = []
    for triton in (True, False):
        with patch.object(float8, "suits_triton", lambda x, triton=triton: triton):
            out = ttt_kernels.fp8_linear_pair(pair, weight, scaling)
            one = ttt_kernels.fp8_linear(pair[0], weight, scaling)
            wanted = torch.autograd.grad([out, one], [pair, weight], [seed, seed[0]])
        found.append((out, one, *wanted))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("rowwise", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("tokens", [1, 21, 64])
def test_products_are_those_of_the_rounded_values(rowwise, tokens, device):
    """Output, input's gradient and weight's gradient, whose sums are over 16, 21 and 64 tokens."""
    scaling = CurrentScaling(rowwise=rowwise)
    x = spread(tokens, 48, seed=1, device=device).clamp(-4, 4).bfloat16()
    weight = spread(32, 48, seed=2, device=device).clamp(-4, 4)
    dy = spread(tokens, 32, seed=3, device=device).clamp(-4, 4).bfloat16()
    of_x, of_dy = (
        scaling.round_sides(one, role, turned=True)
        for one, role in ((x, "input"), (dy, "cotangent"))
    )
    straight, turned = scaling.round_weight(weight)
    for a, b in ((of_x[0], straight), (of_dy[0], turned), (of_dy[1], of_x[1])):
        wide = [one.values(torch.float64) for one in (a, b)]
        exact, bound = wide[0] @ wide[1].t(), wide[0].abs() @ wide[1].abs().t()
        for dtype in (torch.bfloat16, torch.float32):
            error = (multiply(a, b, dtype).double() - exact).abs()
            assert (error <= 2**-8 * bound).all()
