"""Linear maps and the output head on pairs, with and without what the forward sweep kept."""

import pytest
import torch
from lock_step import in_lock_step
from torch.func import jvp

from ttt_kernels import (
    fast_linear,
    fast_linear_pair,
    linear,
    linear_cross_entropy,
    linear_cross_entropy_pair,
    linear_pair,
)
from ttt_kernels.linear_cross_entropy import torch_path as head_path
from ttt_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from ttt_kernels.linear_cross_entropy.shard import VocabularyShard


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def grads(out, arguments, cotangent=None):
    return [out, *torch.autograd.grad(out, arguments, cotangent)]


@pytest.mark.parametrize("reuse", [False, True])
def test_static_linear_pair(reuse):
    pair, weight = draw(2, 3, 4, 5), draw(6, 5)
    cotangent = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = grads(linear(pair, weight), [pair, weight], cotangent)
    kept = (expected[0][0].detach(), expected[1][1]) if reuse else ()
    assert_close(grads(linear_pair(pair, weight, *kept), [pair, weight], cotangent), expected)


@pytest.mark.parametrize("reuse", [False, True])
def test_fast_linear_pair(reuse):
    pair, weight, direction = draw(2, 3, 4, 5), draw(3, 6, 5), torch.randn(3, 6, 5).double()
    cotangent = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    reference = torch.stack(jvp(fast_linear, (pair[0], weight), (pair[1], direction)))
    expected = grads(reference, [pair, weight], cotangent)
    kept = (expected[0][0].detach(), expected[1][1]) if reuse else ()
    actual = grads(fast_linear_pair(pair, weight, direction, *kept), [pair, weight], cotangent)
    assert_close(actual, expected)


def test_fast_linear_of_an_input_without_tangent():
    x, weight, direction = draw(3, 4, 5), draw(3, 6, 5), torch.randn(3, 6, 5).double()
    cotangent = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    reference = torch.stack(jvp(lambda w: fast_linear(x, w), (weight,), (direction,)))
    expected = grads(reference, [x, weight], cotangent)
    assert_close(grads(fast_linear_pair(x, weight, direction), [x, weight], cotangent), expected)


@pytest.fixture(params=[1 << 21, 30])
def tile_elements(request, monkeypatch):
    monkeypatch.setattr(head_path, "MAX_TILE_ELEMENTS", request.param)


@pytest.mark.usefixtures("tile_elements")
def test_head_equals_the_definition():
    hidden, weight = draw(2, 7, 5), draw(11, 5)
    targets, token_weights = torch.randint(11, (2, 7)), torch.rand(2, 7, dtype=torch.float64)
    loss, nll = linear_cross_entropy(hidden, weight, targets, token_weights)
    expected, expected_nll = linear_cross_entropy_reference(hidden, weight, targets, token_weights)
    assert_close([nll], [expected_nll])
    assert_close(grads(loss * 3, [hidden, weight]), grads(expected * 3, [hidden, weight]))


@pytest.mark.usefixtures("tile_elements")
@pytest.mark.parametrize("reuse", [False, True])
def test_head_pair(reuse):
    pair, weight = draw(2, 2, 7, 5), draw(11, 5)
    targets = torch.randint(11, (2, 7))
    a, b = torch.rand(2, 2, 7, dtype=torch.float64).unbind(0)

    def tangent(x, dot_x):
        def weighted(y):
            return linear_cross_entropy_reference(y, weight, targets, b)[0]

        return jvp(weighted, (x,), (dot_x,))[1]

    reference = linear_cross_entropy_reference(pair[0], weight, targets, a)[0] + tangent(*pair)
    expected = grads(reference, [pair, weight])
    kept = (expected[1][1],) if reuse else ()
    actual = linear_cross_entropy_pair(pair, weight, targets, a, b, *kept)
    assert_close(grads(actual, [pair, weight]), expected)


@pytest.mark.usefixtures("tile_elements")
@pytest.mark.parametrize("cut", [(0, 6, 11), (0, 4, 4, 9, 11)])
def test_shards_of_the_vocabulary_add_up_to_the_whole(cut):
    hidden, weight = draw(2, 2, 7, 5), draw(11, 5)
    targets = torch.randint(11, (2, 7))
    a, b = torch.rand(2, 2, 7, dtype=torch.float64).unbind(0)
    expected = grads(linear_cross_entropy_pair(hidden, weight, targets, a, b), [hidden, weight])
    first = linear_cross_entropy(hidden[0], weight, targets, a)
    expected_first = [first[1], *grads(first[0], [hidden, weight])]

    def run(rank, reduce):
        part = weight[cut[rank] : cut[rank + 1]]
        shard = VocabularyShard(
            cut[rank], 6, lambda x: reduce(x, torch.maximum), lambda x: reduce(x, torch.add)
        )
        own = [hidden.detach().requires_grad_(), part.detach().requires_grad_()]
        pair = grads(linear_cross_entropy_pair(own[0], own[1], targets, a, b, shard=shard), own)
        loss, nll = linear_cross_entropy(own[0][0], own[1], targets, a, shard)
        return pair, [nll, *grads(loss, own)]

    shards = in_lock_step(len(cut) - 1, run)
    for of_shards, whole in zip(zip(*shards, strict=True), (expected, expected_first), strict=True):
        for *values, _, _ in of_shards:
            assert_close(values, whole[:-2])
        d_hidden, d_weight = zip(*(one[-2:] for one in of_shards), strict=True)
        assert_close([sum(d_hidden), torch.cat(d_weight)], whole[-2:])


def test_a_target_in_no_shard_leaves_no_finite_loss():
    hidden, weight, a = draw(2, 5), draw(4, 5), torch.ones(2, dtype=torch.float64)
    shard = VocabularyShard(0, 4)
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([3, 4]), a, shard)
    assert nll.isnan().tolist() == [False, True]
    assert loss.isnan()
    with pytest.raises(ValueError, match="Target 4 is outside the vocabulary of 4"):
        linear_cross_entropy(hidden, weight, torch.tensor([3, 4]), a)


@pytest.mark.parametrize("operation", [linear_cross_entropy, linear_cross_entropy_pair])
def test_a_second_backward_pass_is_refused(operation):
    pair, weight = draw(2, 3, 5), draw(4, 5)
    targets, weights = torch.tensor([3, 0, 1]), torch.ones(3, dtype=torch.float64)
    if operation is linear_cross_entropy:
        value, _ = operation(pair[0], weight, targets, weights)
    else:
        value = operation(pair, weight, targets, weights, weights)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass may run once"):
        value.backward()
