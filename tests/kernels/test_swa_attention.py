"""Sliding-window attention against its definition: values, gradients, pairs, cached keys."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp

from ttt_kernels.swa_attention import tiles
from ttt_kernels.swa_attention.op import (
    KnownAdjoints,
    swa_attention,
    swa_attention_pair,
    swa_attention_saved,
)
from ttt_kernels.swa_attention.reference import swa_attention_reference

# b, T, n, n_kv, d, window, past
SHAPES = [
    (2, 7, 2, 2, 4, 3, 0),
    (1, 70, 2, 1, 4, 33, 0),
    (2, 150, 4, 2, 4, 20, 0),
    (1, 40, 2, 2, 4, None, 0),
    (2, 8, 4, 1, 6, 5, 4),
    (1, 9, 2, 2, 4, 64, 3),
    (2, 300, 2, 2, 2, 256, 255),
    (1, 1, 2, 2, 4, 8, 7),
]


def inputs(shape, seed=0):
    b, t, n, n_kv, d, window, past = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    q, k, v = draw(b, t, n, d), draw(b, t, n_kv, d), draw(b, t, n_kv, d)
    pasts = (draw(b, past, n_kv, d), draw(b, past, n_kv, d)) if past else (None, None)
    return [q, k, v], list(pasts), window


def leaves(tensors):
    return [None if x is None else x.clone().requires_grad_() for x in tensors]


def grads(output, cotangent, tensors):
    wanted = [x for x in tensors if x is not None]
    return torch.autograd.grad(output, wanted, cotangent)


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_definition(shape):
    qkv, past, window = inputs(shape)
    cotangent = torch.randn_like(qkv[0])
    results = []
    for function in (swa_attention, swa_attention_reference):
        tensors = leaves([*qkv, *past])
        out = function(*tensors[:3], window, *tensors[3:])
        results.append([out, *grads(out, cotangent, tensors)])
    assert_close(*results)


def test_gradients_of_own_keys_do_not_depend_on_whether_the_cache_needs_any():
    qkv, past, window = inputs((2, 8, 4, 1, 6, 5, 4))
    cotangent = torch.randn_like(qkv[0])
    with_cache, without = leaves([*qkv, *past]), leaves(qkv)
    expected = grads(swa_attention(*with_cache[:3], window, *with_cache[3:]), cotangent, with_cache)
    actual = grads(swa_attention(*without, window, *past), cotangent, without)
    assert_close(actual, expected[:3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reuse", [False, True])
def test_pair_equals_forward_mode_and_its_gradient_autograd(shape, reuse):
    qkv, past, window = inputs(shape)
    dots = [torch.randn_like(x) for x in qkv]
    cotangent = torch.randn(2, *qkv[0].shape, dtype=torch.float64)

    def reference(*arguments):
        q, k, v, dot_q, dot_k, dot_v, *cached = arguments
        value, tangent = jvp(
            lambda *x: swa_attention_reference(*x, window, *cached),
            (q, k, v),
            (dot_q, dot_k, dot_v),
        )
        return torch.stack((value, tangent))

    plain = leaves([*qkv, *dots, *past])
    expected = reference(*plain)
    expected_grads = grads(expected, cotangent, plain)
    pairs = leaves([torch.stack(p) for p in zip(qkv, dots, strict=True)])
    cached = leaves(past)
    saved = known = None
    if reuse:
        saved = swa_attention_saved(*qkv, window, *past)
        known = KnownAdjoints(*expected_grads[3:6])
    actual = swa_attention_pair(*pairs, window, *cached, saved, known)
    actual_grads = grads(actual, cotangent, [*pairs, *cached])
    assert_close([actual], [expected])
    stacked = [torch.stack((expected_grads[i], expected_grads[i + 3])) for i in range(3)]
    assert_close(actual_grads, [*stacked, *expected_grads[6:]])


@pytest.mark.parametrize("function", [swa_attention, swa_attention_reference])
def test_gradients_and_their_gradients_against_finite_differences(function):
    qkv, past, window = inputs((1, 4, 2, 1, 2, 3, 2))
    for tensors in (leaves([*qkv, *past]), leaves(qkv)):

        def attend(q, k, v, *cached):
            return function(q, k, v, window, *cached)

        # The first backward pass finds the probabilities, a second one forms them again.
        assert gradcheck(attend, tensors, nondet_tol=1e-12)
        assert gradgradcheck(attend, tensors, nondet_tol=1e-12)


def test_gradients_of_a_pair_against_finite_differences():
    qkv, past, window = inputs((1, 4, 2, 1, 2, 3, 2))
    pairs = leaves([torch.stack((x, torch.randn_like(x))) for x in qkv])

    def attend(q, k, v, *cached):
        return swa_attention_pair(q, k, v, window, *cached)

    assert gradcheck(attend, [*pairs, *leaves(past)], nondet_tol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_gradients_equal_the_definition(shape):
    qkv, past, window = inputs(shape)
    weights = [torch.randn_like(x) for x in (*qkv, *past) if x is not None]
    cotangent = torch.randn_like(qkv[0])
    results = []
    for function in (swa_attention, swa_attention_reference):
        tensors, seed = leaves([*qkv, *past]), cotangent.clone().requires_grad_()
        out = function(*tensors[:3], window, *tensors[3:])
        wanted = [x for x in tensors if x is not None]
        first = torch.autograd.grad(out, wanted, seed, create_graph=True)
        results.append(torch.autograd.grad(first, [seed, *wanted], weights))
    assert_close(*results)


def test_only_tiles_inside_the_window_are_visited():
    visited = sum(
        g.count * g.rows * g.span
        for g in tiles.tile_groups(4096, 4096, 64, matrices=2, batched=True)
    )
    assert visited <= 4096 * (64 + 64)


def test_low_precision_is_computed_in_float32():
    qkv, past, window = inputs((2, 40, 2, 2, 8, 16, 0))
    exact = swa_attention_reference(*qkv, window, *past)
    half = swa_attention(*[x.bfloat16() for x in qkv], window)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=3e-2)
