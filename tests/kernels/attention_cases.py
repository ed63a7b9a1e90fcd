"""Shapes and inputs on which attention's kernels are held against the definition."""

from typing import NamedTuple

import torch
import triton_runs
from torch.func import jvp

from ttt_kernels.swa_attention import triton_tiles
from ttt_kernels.swa_attention.op import (
    KnownAdjoints,
    swa_attention_pair,
    swa_attention_saved,
)
from ttt_kernels.swa_attention.reference import swa_attention_reference
from ttt_kernels.swa_attention.triton_tiles import Tile


class Case(NamedTuple):
    """Sequences, queries, heads, key heads, head dim, window, cached keys (None: no cache)."""

    b: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    past: int | None


# With tiles of 16 queries and 16 keys.
CASES = {
    "first chunk": Case(1, 21, 2, 2, 16, 8, None),
    "chunk over a cache": Case(1, 37, 1, 1, 16, 24, 23),
    "window 1": Case(1, 20, 1, 1, 16, 1, None),
    "window 1, unseen cache": Case(1, 5, 1, 1, 16, 1, 3),
    "window beyond everything": Case(1, 35, 1, 1, 16, 1000, 9),
    "full attention": Case(1, 33, 1, 1, 16, None, 18),
    "cache shorter than the window": Case(1, 18, 1, 1, 16, 40, 5),
    "cache longer than the window": Case(1, 18, 1, 1, 16, 10, 45),
    "leading tiles hidden from most": Case(1, 16, 1, 1, 16, 33, 32),
    "one query": Case(1, 1, 2, 1, 16, 8, 7),
    "empty cache": Case(1, 5, 1, 1, 16, 3, 0),
    "four queries a key": Case(1, 18, 4, 1, 16, 12, 11),
    "several sequences, padded head dim": Case(2, 17, 2, 1, 20, 9, 8),
    "head dim 80": Case(1, 17, 1, 1, 80, 6, 5),
    "head dim 3": Case(1, 17, 1, 1, 3, 6, 5),
}


def use_small_tiles(monkeypatch, rows=16, keys=16, parts=1):
    """Kernels then visit several tiles on short sequences."""
    monkeypatch.setattr(triton_tiles, "tile_of", lambda *_: Tile(rows, keys, 4, 1, parts))


def draw(case, dtype, device, pairs=False):
    """(q, k, v, past_k, past_v) as leaves; the latter None where there is no cache."""
    b, length, heads, kv_heads, d, _, past = case
    lead = (2,) if pairs else ()
    shapes = [(*lead, b, length, n, d) for n in (heads, kv_heads, kv_heads)]
    tensors = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
    if past is None:
        return [*tensors, None, None]
    for _ in range(2):
        x = torch.randn(b, past, kv_heads, d, device=device)
        tensors.append(x.to(dtype).requires_grad_())
    return tensors


def wide(tensors):
    """Float64 copies, as leaves."""
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def given(tensors):
    return [x for x in tensors if x is not None]


def first_order(function, tensors, window, cotangent):
    """[output, gradients]."""
    q, k, v, *past = tensors
    out = function(q, k, v, window, *past)
    return [out, *torch.autograd.grad(out, given(tensors), cotangent.to(out.dtype))]


def second_order(function, tensors, window, cotangent, weights):
    """Gradients of Σ weight·gradient by the inputs and by the output's cotangent."""
    q, k, v, *past = tensors
    seed = cotangent.detach().to(q.dtype).requires_grad_()
    out = function(q, k, v, window, *past)
    leaves = given(tensors)
    grads = torch.autograd.grad(out, leaves, seed, create_graph=True)
    directions = [w.to(out.dtype) for w in weights]
    return list(torch.autograd.grad(grads, [seed, *leaves], directions))


def reference_pair(q, k, v, window, past_k=None, past_v=None):
    """The definition and its derivative along the tangents, by forward mode."""
    values, tangents = (tuple(x[i] for x in (q, k, v)) for i in (0, 1))
    return torch.stack(
        jvp(lambda *x: swa_attention_reference(*x, window, past_k, past_v), values, tangents)
    )


def pair_of(variant, expected):
    """`swa_attention_pair` on its own, on a saved forward pass, or with known adjoints too."""

    def function(q, k, v, window, *past):
        saved = known = None
        if variant != "alone":
            saved = swa_attention_saved(*(x[0].detach() for x in (q, k, v)), window, *past)
        if variant == "known":
            known = KnownAdjoints(*(x[1].to(q.dtype) for x in expected[1:4]))
        return swa_attention_pair(q, k, v, window, *past, saved=saved, known=known)

    return function


def assert_near(actual, expected, dtype, entries=1):
    """Every tensor near its float64 counterpart: as a whole by the norm, and entry by entry.

    The norm of the error is at most the dtype's share of the tensor's norm, and no entry is off by
    more than `entries` times that share of the largest: backward passes take their row sums from
    rounded outputs, which a few entries of a pair feel more than others. Scores without effect (a
    window of 1) have gradients of zero; what rounding leaves of them is measured against the
    largest tensor.
    """
    share = triton_runs.share_of(dtype, actual[0].device)
    largest = max((float(e.abs().max()) for e in expected if e.numel()), default=0.0)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if not e.numel():
            continue
        error, highest = (a.double() - e).detach(), float(e.abs().max())
        if highest < 1e-12 * largest:
            assert float(error.abs().max()) <= share * largest
            continue
        assert float(error.norm() / e.norm()) <= share
        assert float(error.abs().max()) <= entries * share * highest
