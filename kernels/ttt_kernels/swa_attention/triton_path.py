"""Sliding-window attention by Triton kernels: allocation and launches.

The functions mirror those of `torch_path`. Tensors are read by their strides; only one whose last
axis is not dense is copied. Row statistics (log-sum-exp, μ, γ, δ) are [b, n, T] in float32.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ttt_kernels.swa_attention import triton_tiles
from ttt_kernels.swa_attention.triton_backward import dkv_kernel, dq_kernel
from ttt_kernels.swa_attention.triton_forward import forward_kernel
from ttt_kernels.swa_attention.triton_pair_dkv import pair_dkv_kernel
from ttt_kernels.swa_attention.triton_pair_dq import pair_dq_kernel
from ttt_kernels.swa_attention.triton_pair_forward import pair_forward_kernel
from ttt_kernels.swa_attention.triton_tiles import Tile


class Rows(NamedTuple):
    """What the backward pass of a pair needs of its forward pass, per query."""

    lse: Tensor
    mu: Tensor


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of sequence, token and head, of every tensor [b, T, n, d]."""
    return [stride for x in tensors for stride in x.stride()[-4:-1]]


def _statistics(q: Tensor) -> Tensor:
    b, t, n, _ = q.shape
    return torch.empty(b, n, t, dtype=torch.float32, device=q.device)


class _Geometry(NamedTuple):
    """Lengths, window and head counts as the kernels take them; q [b, T, n, d]."""

    b: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    past: int
    window: int
    element_size: int

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def repeats(self) -> int:
        return self.heads // self.kv_heads

    def tile(self, kernel: str) -> Tile:
        return triton_tiles.tile_of(kernel, self.width, self.element_size)

    def settings(self, tile: Tile) -> dict[str, Any]:
        return {
            "ROWS": tile.rows,
            "KEYS": tile.keys,
            "D": self.head_dim,
            "WIDTH": self.width,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def query_grid(self, tile: Tile) -> tuple[int, int, int]:
        return triton.cdiv(self.length, tile.rows), self.heads, self.b

    def key_grid(self, tile: Tile, num_keys: int) -> tuple[int, int, int]:
        return triton.cdiv(num_keys, tile.keys), self.kv_heads, self.b


def _geometry(q: Tensor, k: Tensor, past_k: Tensor | None, window: int | None) -> _Geometry:
    b, length, heads, head_dim = q.shape[-4:]
    past = 0 if past_k is None else past_k.shape[1]
    return _Geometry(
        b,
        length,
        heads,
        k.shape[-2],
        head_dim,
        triton_tiles.padded_width(head_dim),
        past,
        past + length if window is None else min(window, past + length),
        q.element_size(),
    )


def _on(x: Tensor) -> Any:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(output [b, T, n, d] in q's dtype, log-sum-exp [b, n_kv, r, T, 1])."""
    g = _geometry(q, k, past_k, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = _statistics(q)
    q, k, v = _dense(q), _dense(k), _dense(v)
    old_k, old_v = (k, v) if past_k is None or past_v is None else (_dense(past_k), _dense(past_v))
    tile = g.tile(triton_tiles.FORWARD)
    if q.numel():
        with _on(q):
            forward_kernel[g.query_grid(tile)](
                q, k, v, old_k, old_v, out, lse,
                *_strides(q, k, v, old_k, old_v, out),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, d past_k, d past_v); the last two None unless wanted."""
    g = _geometry(q, k, past_k, window)
    q, k, v, d_out = _dense(q), _dense(k), _dense(v), _dense(d_out)
    old_k, old_v = (k, v) if past_k is None or past_v is None else (_dense(past_k), _dense(past_v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = _statistics(q)
    tile = g.tile(triton_tiles.DQ)
    with _on(q):
        dq_kernel[g.query_grid(tile)](
            q, k, v, old_k, old_v, out, d_out, lse, delta, dq,
            *_strides(q, k, v, old_k, old_v, out, d_out, dq),
            g.length, g.past, g.window, g.scale, g.repeats,
            HAS_PAST=g.past > 0, **g.settings(tile),
        )  # fmt: skip
        _launch_dkv(g, q, k, v, d_out, lse, delta, dk, dv, 0)
        if past_k is None or past_v is None or not want_past:
            return dq, dk, dv, None, None
        d_past_k, d_past_v = torch.empty_like(old_k), torch.empty_like(old_v)
        if g.past:
            _launch_dkv(g, q, old_k, old_v, d_out, lse, delta, d_past_k, d_past_v, -g.past)
    return dq, dk, dv, d_past_k, d_past_v


def _launch_dkv(
    g: _Geometry,
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
    dkv_kernel[g.key_grid(tile, k.shape[1])](
        q, k, v, d_out, lse, delta, dk, dv,
        *_strides(q, k, v, d_out, dk, dv),
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
    g = _geometry(q, k, past_k, window)
    q, k, v = _dense(q), _dense(k), _dense(v)
    old_k, old_v = (k, v) if past_k is None or past_v is None else (_dense(past_k), _dense(past_v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    mu = _statistics(q[0])
    lse = mu.new_empty(mu.shape) if saved is None else saved[1].contiguous()
    saved_out = out[0] if saved is None else _dense(saved[0])
    tile = g.tile(triton_tiles.PAIR_FORWARD)
    with _on(q):
        pair_forward_kernel[g.query_grid(tile)](
            q[0], q[1], k[0], k[1], v[0], v[1], old_k, old_v,
            saved_out, out[0], out[1], lse, mu,
            *_strides(q, k, v, old_k, old_v, saved_out, out),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv as pairs, d past_k, d past_v); the last two None unless wanted."""
    g = _geometry(q, k, past_k, window)
    q, k, v, cotangent = _dense(q), _dense(k), _dense(v), _dense(cotangent)
    old_k, old_v = (k, v) if past_k is None or past_v is None else (_dense(past_k), _dense(past_v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    gamma, delta = _statistics(q[0]), _statistics(q[0])
    terms = (*rows, gamma, delta)
    tile = g.tile(triton_tiles.PAIR_DQ)
    with _on(q):
        pair_dq_kernel[g.query_grid(tile)](
            q[0], q[1], k[0], k[1], v[0], v[1], old_k, old_v,
            out[0], out[1], cotangent[0], cotangent[1], *terms, dq[0], dq[1],
            *_strides(q, k, v, old_k, old_v, out, cotangent, dq),
            g.length, g.past, g.window, g.scale, g.repeats,
            HAS_PAST=g.past > 0, KNOWN=known is not None, **g.settings(tile),
        )  # fmt: skip
        tile = g.tile(triton_tiles.PAIR_DKV_OWN)
        _launch_pair_dkv(g, tile, q, k, v, cotangent, terms, dk, dv, known is not None)
        if known is not None:
            for pair, tangent in zip((dq, dk, dv), known, strict=True):
                pair[1].copy_(tangent)
        if past_k is None or past_v is None or not want_past:
            return dq, dk, dv, None, None
        d_past_k, d_past_v = torch.empty_like(old_k), torch.empty_like(old_v)
        if g.past:
            tile = g.tile(triton_tiles.PAIR_DKV_PAST)
            _launch_pair_dkv(g, tile, q, old_k, old_v, cotangent, terms, d_past_k, d_past_v, True)
    return dq, dk, dv, d_past_k, d_past_v


def _launch_pair_dkv(
    g: _Geometry,
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
    halves = [(x[0], x[1]) if own else (x, x) for x in (k, v, dk, dv)]
    num_keys = k.shape[-3]
    wanted = [(True, True)] if tile.parts == 1 else [(True, False), (False, True)]
    for want_k, want_v in wanted:
        pair_dkv_kernel[g.key_grid(tile, num_keys)](
            q[0], q[1], *halves[0], *halves[1], cotangent[0], cotangent[1], *terms,
            *halves[2], *halves[3],
            *_strides(q, k, v, cotangent, dk, dv),
            g.length, num_keys, 0 if own else -num_keys, g.window, g.scale, g.repeats,
            TANGENTS=own, KNOWN=known, WANT_K=want_k, WANT_V=want_v, **g.settings(tile),
        )  # fmt: skip
