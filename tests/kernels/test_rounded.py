"""Weights rounded once are what products read, and only as long as they are the weights."""

import pytest
import torch

from ttt_kernels import (
    RoundedWeights,
    fast_linear,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_pair,
    linear_pair,
    using,
)
from ttt_kernels.rounded import rounded

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(2)


@pytest.fixture
def weight():
    return torch.randn(6, 4)


def test_a_copy_is_read_within_the_context_alone(weight):
    copies = RoundedWeights()
    copies.renew([weight], LOW)
    assert rounded(weight, LOW) is not copies.find(weight, LOW)
    with using(copies):
        assert rounded(weight, LOW) is copies.find(weight, LOW)
        assert rounded(weight.detach(), LOW) is copies.find(weight, LOW)
        assert rounded(weight, torch.float16).dtype == torch.float16
        assert rounded(weight[1:], LOW).shape == (5, 4)
        assert rounded(weight.mT, LOW).shape == (4, 6)
        with using(RoundedWeights()):
            assert rounded(weight, LOW) is copies.find(weight, LOW)
    assert torch.equal(copies.find(weight, LOW), weight.to(LOW))
    assert copies.nbytes == 48


def test_vectors_and_what_has_the_dtype_need_no_copy(weight):
    copies = RoundedWeights()
    copies.renew([weight, torch.ones(4)], torch.float32)
    assert copies.nbytes == 0
    assert rounded(weight, torch.float32) is weight


def test_a_copy_is_renewed_where_it_lies(weight):
    copies = RoundedWeights()
    copies.renew([weight], LOW)
    before = copies.find(weight, LOW)
    # As optimizers that own their parameters' memory write: unnoticed by versions.
    weight.data.mul_(2)
    copies.renew([weight], LOW)
    assert copies.find(weight, LOW) is before
    assert torch.equal(before, weight.to(LOW))
    other = torch.randn(6, 4)
    copies.renew([other], LOW)
    assert copies.find(weight, LOW) is None


def test_a_weight_that_changed_since_is_refused(weight):
    copies = RoundedWeights()
    copies.renew([weight], LOW)
    weight.mul_(2)
    with using(copies), pytest.raises(RuntimeError, match=r"\[6, 4\] was changed after"):
        linear(torch.ones(2, 4, dtype=LOW), weight)


def test_a_gradient_that_goes_through_the_rounding_sees_the_weight(weight):
    weight.requires_grad_()
    copies = RoundedWeights()
    copies.renew([weight], LOW)
    with using(copies):
        linear(torch.ones(2, 4, dtype=LOW), weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((6, 4), 2.0))


PRODUCTS = {
    "linear": lambda w: linear(torch.ones(2, 3, 4, dtype=LOW), w),
    "linear_pair": lambda w: linear_pair(torch.ones(2, 3, 4, dtype=LOW), w),
    "fast_linear": lambda w: fast_linear(
        torch.ones(2, 3, 4, dtype=LOW), w.unflatten(0, (2, 3)).detach()
    ),
    "linear_cross_entropy": lambda w: linear_cross_entropy(
        torch.ones(3, 4, dtype=LOW), w, torch.tensor([0, 1, 2]), torch.ones(3)
    )[0],
    "linear_cross_entropy_pair": lambda w: linear_cross_entropy_pair(
        torch.ones(2, 3, 4, dtype=LOW), w, torch.tensor([0, 1, 2]), torch.ones(3), torch.ones(3)
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_reads_the_copy(name, weight):
    copies = RoundedWeights()
    view = weight.unflatten(0, (2, 3)) if name == "fast_linear" else weight
    copies.renew([view], LOW)
    expected = PRODUCTS[name](weight)
    with using(copies):
        assert torch.equal(PRODUCTS[name](weight), expected)
        copies.find(view, LOW).zero_()
        found = PRODUCTS[name](weight)
    assert not torch.equal(found, expected)
    assert torch.equal(found, PRODUCTS[name](torch.zeros(6, 4)))
