"""RMSNorm, SwiGLU and RoPE against their definitions, as tensors and as pairs."""

import pytest
import torch
from torch.func import jvp

from ttt_kernels import rms_norm, rms_norm_pair, rope, rotations, swiglu, swiglu_pair
from ttt_kernels.rms_norm.reference import rms_norm_reference
from ttt_kernels.rope.reference import rope_reference
from ttt_kernels.swiglu.reference import swiglu_reference

EPS = 1e-2  # large, so that a misplaced epsilon shows


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def grads(function, arguments):
    out = function(*arguments)
    cotangent = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    return [out, *torch.autograd.grad(out, arguments, cotangent)]


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def as_pair(reference):
    """The definition and its forward-mode derivative in the first argument, stacked."""

    def function(pair, *rest):
        return torch.stack(jvp(lambda x: reference(x, *rest), (pair[0],), (pair[1],)))

    return function


CASES = {
    "rms_norm": (rms_norm, rms_norm_pair, rms_norm_reference, lambda: [draw(7)], (3, 5, 7), (EPS,)),
    "swiglu": (swiglu, swiglu_pair, swiglu_reference, lambda: [], (3, 5, 14), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_first_order(name):
    operation, _, reference, parameters, shape, settings = CASES[name]
    arguments = [draw(*shape), *parameters()]
    actual = grads(lambda *a: operation(*a, *settings), arguments)
    assert_close(actual, grads(lambda *a: reference(*a, *settings), arguments))


@pytest.mark.parametrize("name", CASES)
def test_pair(name):
    _, operation, reference, parameters, shape, settings = CASES[name]
    arguments = [draw(2, *shape), *parameters()]
    actual = grads(lambda *a: operation(*a, *settings), arguments)
    assert_close(actual, grads(lambda *a: as_pair(reference)(*a, *settings), arguments))


def test_rope_turns_interleaved_components_and_back():
    x = draw(2, 5, 3, 8)
    rotation = rotations(100, 5, 8, 500.0, x)
    actual = grads(lambda y: rope(y, rotation), [x])
    assert_close(actual, grads(lambda y: rope_reference(y, rotation), [x]))
    angle = 102 * 500.0 ** -(2 / 8)
    expected = x[0, 2, 1, 2] * torch.cos(torch.tensor(angle)) - x[0, 2, 1, 3] * torch.sin(
        torch.tensor(angle)
    )
    torch.testing.assert_close(rope(x, rotation)[0, 2, 1, 2], expected, rtol=1e-6, atol=1e-6)


def test_rotations_do_not_lose_precision_at_large_positions():
    near = rotations(1_000_000, 1, 4, 500_000.0, torch.zeros(1))
    exact = torch.polar(torch.ones(2).double(), 1e6 * 500_000.0 ** -torch.tensor([0, 0.5]).double())
    torch.testing.assert_close(near[0].to(torch.complex128), exact, rtol=0, atol=1e-7)
