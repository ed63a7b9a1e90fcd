"""Gradients of static weights that are put off: the same ones later, and none lost in silence."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ttt_kernels import (
    WeightGradients,
    fast_linear,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_pair,
    linear_pair,
    plain_definitions,
    putting_off,
    weight_gradients,
)
from ttt_kernels.linear_cross_entropy import torch_path as head_path


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


TARGETS = torch.randint(11, (2, 7))
SHARES = torch.rand(2, 2, 7, dtype=torch.float64)
ADJOINT = torch.randn(2, 7, 5, dtype=torch.float64)
PRIMAL = torch.randn(2, 7, 11, dtype=torch.float64)

# An operation on x [2, 2, 7, 5] and weight [11, 5].
OPERATIONS = {
    "linear": linear,
    "fast_linear with shared weights": lambda x, w: fast_linear(x[0], w),
    "linear_pair": linear_pair,
    "linear_pair with what was kept": lambda x, w: linear_pair(x, w, PRIMAL, ADJOINT),
    "head": lambda x, w: linear_cross_entropy(x[0], w, TARGETS, SHARES[0])[0],
    "head of pairs": lambda x, w: linear_cross_entropy_pair(x, w, TARGETS, *SHARES),
    "head of pairs with what was kept": lambda x, w: linear_cross_entropy_pair(
        x, w, TARGETS, *SHARES, ADJOINT
    ),
}


@pytest.fixture(params=OPERATIONS)
def operation(request, monkeypatch):
    # Two tiles of the head.
    monkeypatch.setattr(head_path, "MAX_TILE_ELEMENTS", 110)
    return OPERATIONS[request.param]


def backward(operation, x, weight):
    # Twice, so that two products of one weight add up; an odd cotangent.
    for _ in range(2):
        out = operation(x, weight)
        out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape))


@pytest.mark.parametrize("buffered", [False, True])
def test_put_off_gradients_are_the_same(operation, buffered):
    x, weight = draw(2, 2, 7, 5), draw(11, 5)
    backward(operation, x, weight)
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    start = torch.ones_like(weight) if buffered else torch.zeros_like(weight)
    if buffered:
        weight.main_grad = start.clone()
    gradients = WeightGradients()
    with putting_off(gradients):
        backward(operation, x, weight)
    assert weight.grad is None
    assert gradients.pending == 2
    assert gradients.nbytes > 0
    gradients.form()
    assert gradients.pending == gradients.nbytes == 0
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-12, atol=1e-13)
    found = weight.main_grad if buffered else weight.grad
    torch.testing.assert_close(found - start, expected[1], rtol=1e-12, atol=1e-13)


def test_bfloat16_products_add_up_in_the_gradients_precision():
    x, weight = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True), torch.randn(5, 4)
    weight.requires_grad_()
    gradients = WeightGradients()
    with putting_off(gradients):
        out = linear(x, weight)
    out.sum().backward()
    gradients.form()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        weight.grad, x.detach().float().sum(0).expand(5, 4), rtol=1e-2, atol=1e-2
    )


def test_stand_ins_gradients_become_the_weights():
    x, weight = draw(3, 4), draw(5, 4)
    gradients = WeightGradients()
    leaf = gradients.stand_in(weight)
    with putting_off(gradients):
        out = linear(x, leaf)
    # One use is put off, the other is autograd's.
    (out.sum() + leaf.square().sum()).backward()
    gradients.form()
    expected = x.detach().sum(0).expand(5, 4) + 2 * weight.detach()
    torch.testing.assert_close(weight.grad, expected)


def test_recomputed_activations():
    x, first, second = draw(3, 4), draw(5, 4), draw(6, 5)

    def run(x):
        return linear(linear(x, first).tanh(), second)

    run(x).sum().backward()
    expected = [t.grad for t in (x, first, second)]
    x.grad = first.grad = second.grad = None
    gradients = WeightGradients()
    with putting_off(gradients):
        checkpoint(run, x, use_reentrant=False).sum().backward()
    assert gradients.pending == 2
    gradients.form()
    torch.testing.assert_close([t.grad for t in (x, first, second)], expected)


def test_what_cannot_be_put_off_is_left_to_autograd():
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    gradients = WeightGradients()
    with putting_off(gradients):
        linear(x, weight).sum().backward()
        with plain_definitions():
            linear(x.clone().requires_grad_(), weight).sum().backward()
        with putting_off(None):
            linear(x.clone().requires_grad_(), weight).sum().backward()
    assert gradients.pending == 0
    torch.testing.assert_close(weight.grad, 3 * x.sum(0).expand(5, 4))


def test_context_ends_and_reaches_other_threads():
    seen = []
    gradients = WeightGradients()
    with putting_off(gradients):
        thread = threading.Thread(target=lambda: seen.append(weight_gradients()))
        thread.start()
        thread.join()
    assert seen == [gradients]
    assert weight_gradients() is None
    with pytest.raises(ValueError, match="weight must be"), putting_off(gradients):
        linear(draw(3, 4), draw(5, 6))
    assert weight_gradients() is None


def test_a_product_that_comes_too_late_is_refused():
    x, weight = draw(3, 4), draw(5, 4)
    gradients = WeightGradients()
    with putting_off(gradients):
        out = linear(x, weight)
    gradients.form()
    with pytest.raises(RuntimeError, match="after those put off were formed"):
        out.sum().backward()
