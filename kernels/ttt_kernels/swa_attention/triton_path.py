"""Sliding-window attention by Triton kernels: allocation and launches.

The functions mirror those of `torch_path`. Tensors are read by their strides; only one that no
kernel could address is copied. Row statistics (log-sum-exp, μ, γ, δ) are [b, n, T] in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ttt_kernels.swa_attention import triton_tiles
from ttt_kernels.swa_attention.triton_backward import dkv_kernel, dq_kernel
from ttt_kernels.swa_attention.triton_blocks import dense, statistics_of, strides_of
from ttt_kernels.swa_attention.triton_forward import forward_kernel
from ttt_kernels.swa_attention.triton_geometry import Geometry, geometry_of
from ttt_kernels.swa_attention.triton_pair_dkv import pair_dkv_kernel
from ttt_kernels.swa_attention.triton_pair_dq import pair_dq_kernel
from ttt_kernels.swa_attention.triton_pair_forward import pair_forward_kernel
from ttt_kernels.swa_attention.triton_tiles import Tile
from ttt_kernels.triton_launch import launch

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Rows(NamedTuple):
    """What the backward pass of a pair needs of its forward pass, per query."""

    lse: Tensor
    mu: Tensor


def _new(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _new_past(past_k: Tensor | None, past_v: Tensor | None, wanted: bool) -> list[Tensor]:
    """Room for the gradients of cached keys and values; none unless wanted."""
    return [_new(x) for x in (past_k, past_v) if x is not None and wanted]


def _gradients(dq: Tensor, dk: Tensor, dv: Tensor, past: list[Tensor]) -> Gradients:
    d_past_k, d_past_v = past or (None, None)
    return dq, dk, dv, d_past_k, d_past_v


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(output [b, T, n, d] in q's dtype, log-sum-exp [b, n_kv, r, T, 1])."""
    g = geometry_of(q, k, past_k, window)
    out, lse = _new(q), statistics_of(q)
    if q.numel():
        q, tile = dense(q), g.tile(triton_tiles.FORWARD)
        launch(
            forward_kernel, g.query_grid(tile),
            q, *g.key_blocks(tile, k, v, past_k, past_v), out, lse,
            *strides_of(q, out),
            g.length, g.past, g.window, g.scale, g.repeats,
            HAS_PAST=g.past > 0, **g.settings(tile),
        )  # fmt: skip
    return out, lse.view(g.b, g.kv_heads, g.repeats, g.length, 1)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    want_past: bool,
) -> Gradients:
    """(dq, dk, dv, d past_k, d past_v); the last two None unless wanted."""
    g = geometry_of(q, k, past_k, window)
    dq, dk, dv = _new(q), _new(k), _new(v)
    d_past = _new_past(past_k, past_v, want_past)
    if not q.numel():
        return _gradients(dq, dk, dv, [x.zero_() for x in d_past])
    q, d_out, delta = dense(q), dense(d_out), statistics_of(q)
    tile = g.tile(triton_tiles.DQ)
    launch(
        dq_kernel, g.query_grid(tile),
        q, *g.key_blocks(tile, k, v, past_k, past_v), out, d_out, lse, delta, dq,
        *strides_of(q, out, d_out, dq),
        g.length, g.past, g.window, g.scale, g.repeats,
        HAS_PAST=g.past > 0, **g.settings(tile),
    )  # fmt: skip
    _launch_dkv(g, q, k, v, d_out, lse, delta, dk, dv, 0)
    if past_k is not None and past_v is not None and d_past:
        _launch_dkv(g, q, past_k, past_v, d_out, lse, delta, d_past[0], d_past[1], -g.past)
    return _gradients(dq, dk, dv, d_past)


def _launch_dkv(
    g: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    offset: int,
) -> None:
    tile = g.tile(triton_tiles.DKV)
    k, v = dense(k), dense(v)
    launch(
        dkv_kernel, g.key_grid(tile, k.shape[1]),
        k, v, *g.query_blocks(tile, q, d_out), lse, delta, dk, dv,
        *strides_of(k, v, dk, dv),
        g.length, k.shape[1], offset, g.window, g.scale, g.repeats,
        **g.settings(tile),
    )  # fmt: skip


def pair_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
    saved: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Rows]:
    """(output and tangent [2, b, T, n, d], row statistics); saved = (output, log-sum-exp)."""
    g = geometry_of(q, k, past_k, window)
    out, mu = _new(q), statistics_of(q[0])
    lse = _new(mu) if saved is None else saved[1].contiguous()
    if not q.numel():
        return out, Rows(lse, mu)
    q, saved_out = dense(q), out[0] if saved is None else dense(saved[0])
    tile = g.tile(triton_tiles.PAIR_FORWARD)
    launch(
        pair_forward_kernel, g.query_grid(tile),
        q[0], q[1], *g.key_blocks(tile, k, v, past_k, past_v),
        saved_out, out[0], out[1], lse, mu,
        *strides_of(q, saved_out, out),
        g.length, g.past, g.window, g.scale, g.repeats,
        HAS_PAST=g.past > 0, SAVED=saved is not None, **g.settings(tile),
    )  # fmt: skip
    return out, Rows(lse, mu)


def pair_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
    out: Tensor,
    rows: Rows,
    cotangent: Tensor,
    known: tuple[Tensor, Tensor, Tensor] | None,
    want_past: bool,
) -> Gradients:
    """(dq, dk, dv as pairs, d past_k, d past_v); the last two None unless wanted."""
    g = geometry_of(q, k, past_k, window)
    dq, dk, dv = _new(q), _new(k), _new(v)
    d_past = _new_past(past_k, past_v, want_past)
    if not q.numel():
        return _gradients(dq, dk, dv, [x.zero_() for x in d_past])
    q, cotangent = dense(q), dense(cotangent)
    terms = (*rows, statistics_of(q[0]), statistics_of(q[0]))
    tile = g.tile(triton_tiles.PAIR_DQ)
    launch(
        pair_dq_kernel, g.query_grid(tile),
        q[0], q[1], *g.key_blocks(tile, k, v, past_k, past_v),
        out[0], out[1], cotangent[0], cotangent[1], *terms, dq[0], dq[1],
        *strides_of(q, out, cotangent, dq),
        g.length, g.past, g.window, g.scale, g.repeats,
        HAS_PAST=g.past > 0, KNOWN=known is not None, **g.settings(tile),
    )  # fmt: skip
    kernel = triton_tiles.PAIR_DKV_OWN if known is None else triton_tiles.PAIR_DKV_KNOWN
    _launch_pair_dkv(g, g.tile(kernel), q, k, v, cotangent, terms, dk, dv, known is not None)
    if known is not None:
        for pair, tangent in zip((dq, dk, dv), known, strict=True):
            pair[1].copy_(tangent)
    if past_k is not None and past_v is not None and d_past:
        tile = g.tile(triton_tiles.PAIR_DKV_PAST)
        d_k, d_v = d_past
        _launch_pair_dkv(g, tile, q, past_k, past_v, cotangent, terms, d_k, d_v, True)
    return _gradients(dq, dk, dv, d_past)


def _launch_pair_dkv(
    g: Geometry,
    tile: Tile,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cotangent: Tensor,
    terms: tuple[Tensor, ...],
    dk: Tensor,
    dv: Tensor,
    known: bool,
) -> None:
    """k, v, dk and dv are pairs of own keys, or cached ones without tangents."""
    own = k.dim() == 5
    k, v = dense(k), dense(v)
    halves = [(x[0], x[1]) if own else (x, x) for x in (k, v, dk, dv)]
    num_keys = k.shape[-3]
    wanted = [(True, True)] if tile.parts == 1 else [(True, False), (False, True)]
    for want_k, want_v in wanted:
        launch(
            pair_dkv_kernel, g.key_grid(tile, num_keys),
            *halves[0], *halves[1], *g.query_blocks(tile, q, cotangent), *terms,
            *halves[2], *halves[3],
            *strides_of(k, v, dk, dv),
            g.length, num_keys, 0 if own else -num_keys, g.window, g.scale, g.repeats,
            TANGENTS=own, KNOWN=known, WANT_K=want_k, WANT_V=want_v, **g.settings(tile),
        )  # fmt: skip
