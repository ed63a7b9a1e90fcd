"""The float8 linear map: rounding, products, derivatives, scales."""

import pytest
import torch

import ttt_kernels
from ttt_kernels import CurrentScaling, DelayedScaling, WeightGradients, putting_off
from ttt_kernels.fp8_linear.float8 import (
    E4M3,
    E5M2,
    fitting_exponent,
    largest,
    multiply,
    round_to_float8,
)
from ttt_kernels.fp8_linear.scaling import ROLES

WAYS = pytest.mark.parametrize("rowwise", [False, True], ids=["tensor", "row"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A wide spread, so that some values are subnormal in float8.
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.exp(2 * torch.randn(shape, generator=generator, dtype=torch.float64))).to(
        dtype
    )


@pytest.mark.parametrize(("dtype", "top"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_the_scale_is_the_largest_power_of_two_that_fits(dtype, top):
    fits = torch.tensor([top, top / 2, top * 2**40, top * 2**-60, 1.0, 3e38, 1e-30])
    misses = torch.nextafter(fits[:4], torch.tensor(torch.inf))
    for amax in (fits, misses):
        scaled = amax.double() * torch.exp2(fitting_exponent(amax, dtype).double())
        assert (scaled <= top).all()
        assert (scaled > top / 2).all()
    for amax, exponent in ((0.0, 0), (torch.nan, 0), (1e-45, 126)):
        assert fitting_exponent(torch.tensor(amax), dtype) == exponent


@WAYS
def test_rounding_is_to_the_nearest_in_every_dtype(rowwise):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = normal(5, 37, dtype=dtype).clamp(-1e3, 1e3)
        rounded = round_to_float8(x, E4M3, largest(x, rowwise))
        assert rounded.data.shape == (5, 48)
        back = rounded.values(torch.float64)
        assert not back[:, 37:].any()
        coarse = 2.0**-9 * rounded.inverse.double()
        error = (back[:, :37] - x.double()).abs()
        assert (error <= torch.maximum(x.double().abs() * 2**-4, coarse / 2)).all()


@WAYS
@pytest.mark.parametrize("tokens", [1, 32, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_values(rowwise, tokens, dtype):
    x, w = normal(tokens, 48, dtype=dtype), normal(32, 48, seed=1, dtype=dtype)
    a = round_to_float8(x, E5M2, largest(x, rowwise))
    b = round_to_float8(w, E4M3, largest(w, rowwise))
    product = multiply(a, b, dtype)
    assert product.dtype == dtype
    exact = a.values(torch.float64) @ b.values(torch.float64).t()
    bound = a.values(torch.float64).abs() @ b.values(torch.float64).abs().t()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert ((product.double() - exact).abs() <= tolerance * bound).all()


def plain_pair(pair, weight, scaling):
    """Value and tangent by differentiating the plain definition twice."""
    with ttt_kernels.plain_definitions():
        x, tangent = pair
        y = ttt_kernels.fp8_linear(x, weight, scaling)
        seed = torch.zeros_like(y, requires_grad=True)
        [dx] = torch.autograd.grad(y, x, seed, create_graph=True)
        [dot_y] = torch.autograd.grad(dx, seed, tangent, create_graph=True)
    return y, dot_y


@WAYS
def test_value_and_gradients_are_the_plain_definitions(rowwise):
    scaling = CurrentScaling(rowwise=rowwise)
    found = []
    for plain in (True, False):
        x = normal(2, 11, 32).requires_grad_()
        weight = normal(48, 32, seed=1).requires_grad_()
        cotangent = normal(2, 11, 48, seed=2)
        if plain:
            with ttt_kernels.plain_definitions():
                y = ttt_kernels.fp8_linear(x, weight, scaling)
        else:
            y = ttt_kernels.fp8_linear(x, weight, scaling)
        found.append((y, *torch.autograd.grad(y, (x, weight), cotangent)))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@WAYS
def test_the_pair_and_its_gradients_are_the_plain_definitions_derivatives(rowwise):
    scaling = CurrentScaling(rowwise=rowwise)
    x, tangent = normal(2, 11, 32).requires_grad_(), (normal(2, 11, 32, seed=3) * 1e-5)
    tangent.requires_grad_()
    weight = normal(48, 32, seed=1).requires_grad_()
    seeds = normal(2, 11, 48, seed=4), normal(2, 11, 48, seed=5) * 1e-4
    expected = plain_pair((x, tangent), weight, scaling)
    wanted = torch.autograd.grad(expected, (x, tangent, weight), seeds)
    pair = torch.stack((x, tangent)).detach().requires_grad_()
    out = ttt_kernels.fp8_linear_pair(pair, weight, scaling)
    d_pair, d_weight = torch.autograd.grad(out, (pair, weight), torch.stack(seeds))
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_pair, torch.stack(wanted[:2]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_weight, wanted[2], rtol=1e-12, atol=1e-12)


@WAYS
def test_what_the_forward_sweep_kept_is_used(rowwise):
    scaling = CurrentScaling(rowwise=rowwise)
    weight = normal(16, 32).requires_grad_()
    pair = torch.stack((normal(3, 5, 32), normal(3, 5, 32, seed=1))).requires_grad_()
    seed = torch.stack((normal(3, 5, 16, seed=2), normal(3, 5, 16, seed=3)))
    found = []
    for kept in (False, True):
        primal = dot_adjoint = None
        if kept:
            primal, dot_adjoint = normal(3, 5, 16, seed=4), normal(3, 5, 32, seed=5)
        out = ttt_kernels.fp8_linear_pair(pair, weight, scaling, None, primal, dot_adjoint)
        found.append((out, *torch.autograd.grad(out, (pair, weight), seed)))
        if kept:
            torch.testing.assert_close(out[0], primal)
            torch.testing.assert_close(found[-1][1][1], dot_adjoint)
    (out, d_pair, d_weight), (kept_out, d_kept_pair, d_kept_weight) = found
    torch.testing.assert_close(out[1], kept_out[1])
    torch.testing.assert_close(d_pair[0], d_kept_pair[0])
    torch.testing.assert_close(d_weight, d_kept_weight)


def test_a_small_tangent_survives_beside_its_value():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x, tangent = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    tangent = tangent * 1e-7
    apart = ttt_kernels.fp8_linear_pair(torch.stack((x, tangent)), weight, CurrentScaling())[1]
    # One scale for both is what a pair treated as a batch of twice the tokens would have.
    shared = ttt_kernels.fp8_linear(torch.stack((x, tangent)), weight, CurrentScaling())[1]
    exact = tangent @ weight.t()
    assert (apart - exact).norm() < 0.05 * exact.norm()
    assert (shared - exact).norm() > 0.9 * exact.norm()


@WAYS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_surfaces(rowwise, bad):
    ways = [CurrentScaling(rowwise=rowwise)]
    if not rowwise:
        ways.append(DelayedScaling(steps=2))
        ways[-1].load(torch.ones(len(ROLES), 2))
    for scaling in ways:
        weight = normal(16, 32, dtype=torch.float32)
        x = normal(4, 32, dtype=torch.float32)
        x[2, 3] = bad
        assert not ttt_kernels.fp8_linear(x, weight, scaling)[2].isfinite().any()
        good = normal(4, 32, dtype=torch.float32).requires_grad_()
        weight.requires_grad_()
        cotangent = normal(4, 16, seed=1, dtype=torch.float32)
        cotangent[1, 2] = bad
        out = ttt_kernels.fp8_linear(good, weight, scaling)
        dx, dweight = torch.autograd.grad(out, (good, weight), cotangent)
        assert not dx[1].isfinite().any()
        assert not dweight[2].isfinite().any()
        spoilt = weight.detach().clone()
        spoilt[5, 6] = bad
        assert not ttt_kernels.fp8_linear(good, spoilt, scaling)[:, 5].isfinite().any()


@WAYS
def test_zeros_and_tiny_values_divide_by_nothing(rowwise):
    scaling, weight = CurrentScaling(rowwise=rowwise), torch.eye(16)
    for factor in (0.0, 1e-38, 1e-45, 1e30):
        x = torch.full((3, 16), factor)
        y = ttt_kernels.fp8_linear(x, weight, scaling)
        torch.testing.assert_close(y, x, rtol=0.07, atol=1e-38)


def test_a_weights_gradient_can_be_put_off():
    for rowwise in (False, True):
        scaling = CurrentScaling(rowwise=rowwise)
        weight = torch.nn.Parameter(normal(32, 16))
        x, pair = normal(6, 16).requires_grad_(), normal(2, 6, 16).requires_grad_()

        def loss(scaling=scaling, weight=weight, x=x, pair=pair):
            one = ttt_kernels.fp8_linear(x, weight, scaling)
            return (
                one.square().sum() + ttt_kernels.fp8_linear_pair(pair, weight, scaling).sin().sum()
            )

        loss().backward()
        at_once, weight.grad = weight.grad, None
        dx, x.grad, pair.grad = x.grad, None, None
        later = WeightGradients()
        with putting_off(later):
            total = loss()
        total.backward()
        assert weight.grad is None
        assert later.pending == 3
        assert later.nbytes >= 3 * (32 + 16) * 6
        later.form()
        assert later.pending == 0
        torch.testing.assert_close(weight.grad, at_once, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, dx)


def test_delayed_scales_move_between_steps_alone():
    scaling = DelayedScaling(steps=2)
    x = normal(8, 32, dtype=torch.float32)
    first = scaling.round(x, "input")
    assert first.inverse == scaling.round(x, "input").inverse
    scaling.advance()
    # A scale with a history leaves a power of two free.
    delayed = first.inverse * 2
    # Larger values saturate until the step is over; smaller ones keep the old scale.
    large = scaling.round(x * 1024, "input")
    assert large.inverse == delayed
    assert large.values(torch.float32).abs().max() == 448 * delayed
    scaling.advance()
    assert scaling.round(x, "input").inverse == delayed * 1024
    for _ in range(2):
        scaling.round(x, "input")
        scaling.advance()
    assert scaling.round(x * 7, "input").inverse == delayed
    # Roles know nothing of each other.
    assert scaling.history[ROLES.index("tangent")].sum() == 0


def test_a_history_forgets_what_is_not_finite_and_what_trains_nothing():
    scaling = DelayedScaling(steps=3)
    x = normal(4, 16, dtype=torch.float32)
    scaling.round(x, "tangent")
    scaling.advance()
    before = scaling.history.clone()
    scaling.round(torch.full_like(x, torch.inf), "tangent")
    assert not scaling.pending.any()
    scaling.round(x * 100, "tangent")
    scaling.begin()
    scaling.advance()
    assert scaling.history[:, 1:].equal(before[:, :-1])
    assert not scaling.history[:, 0].any()
    again = DelayedScaling(steps=3)
    again.load(scaling.history)
    assert again.round(x, "tangent").inverse == scaling.round(x, "tangent").inverse


def test_unfit_arguments_are_refused():
    x, weight = torch.zeros(4, 32), torch.zeros(48, 32)
    with pytest.raises(ValueError, match=r"multiples of 16.*\[40, 32\]"):
        ttt_kernels.fp8_linear(x, torch.zeros(40, 32), CurrentScaling())
    with pytest.raises(ValueError, match=r"last axis is 32 long.*takes 16"):
        ttt_kernels.fp8_linear(x, torch.zeros(48, 16), CurrentScaling())
    with pytest.raises(TypeError, match="int64"):
        ttt_kernels.fp8_linear(x.long(), weight, CurrentScaling())
    with (
        ttt_kernels.plain_definitions(),
        pytest.raises(ValueError, match="delayed scaling"),
    ):
        ttt_kernels.fp8_linear(x, weight, DelayedScaling(steps=1))
