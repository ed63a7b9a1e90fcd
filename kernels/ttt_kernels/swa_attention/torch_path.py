"""Sliding-window attention by PyTorch's matrix products, tile by tile.

Only keys inside the window are visited and no score matrix outlives its tile, except in a pair
and over a cache: there one chunk's scores are kept from the forward to the backward pass.
"""

import torch
from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype
from ttt_kernels.swa_attention import core
from ttt_kernels.swa_attention.core import PairScores
from ttt_kernels.swa_attention.tiles import (
    TileGroup,
    add_keys,
    additive_mask,
    merge_query_heads,
    put_queries,
    split_query_heads,
    take_keys,
    take_queries,
    tile_groups,
)


def _heads(x: Tensor, past: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[b, P + T, n_kv, d] as [b, n_kv, P + T, d], contiguous, in the accumulation dtype."""
    whole = x if past is None else torch.cat((past, x), dim=1)
    return whole.transpose(1, 2).to(dtype).contiguous()


def _mask(group: TileGroup, window: int | None, repeats: int, like: Tensor) -> Tensor:
    return additive_mask(
        group.rows, group.span, group.shift, window, repeats, like.dtype, like.device
    )


def _groups(q: Tensor, past_k: Tensor | None, window: int | None) -> tuple[TileGroup, ...]:
    """The tiles of q [b, T, n, d] behind the cached keys [b, P, n_kv, d]."""
    b, length, heads, _ = q.shape
    past = 0 if past_k is None else past_k.shape[1]
    return tile_groups(length, past + length, window, b * heads, past_k is None)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(output [b, T, n, d], log-sum-exp [b, n_kv, r, T, 1], probabilities over a cache)."""
    wide = accumulation_dtype(q.dtype)
    queries = split_query_heads(q.to(wide), k.shape[2])
    keys, values = _heads(k, past_k, wide), _heads(v, past_v, wide)
    out = torch.empty_like(queries)
    lse = queries.new_empty(*queries.shape[:-1], 1)
    kept: list[Tensor | None] = []
    for group in _groups(q, past_k, window):
        mask = _mask(group, window, queries.shape[2], queries)
        s = core.scores(take_queries(queries, group), take_keys(keys, group), mask)
        p, row_lse = core.softmax_rows(s)
        put_queries(out, group, torch.bmm(p, take_keys(values, group)))
        put_queries(lse, group, row_lse)
        if past_k is not None:
            kept.append(p)
    return merge_query_heads(out).to(q.dtype), lse, kept


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
    kept: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, d past_k, d past_v); the last two None unless wanted.

    Takes the probabilities out of `kept`, and forms them again where they are gone.
    """
    wide = accumulation_dtype(q.dtype)
    queries, outs, d_outs = (split_query_heads(x.to(wide), k.shape[2]) for x in (q, out, d_out))
    keys, values = _heads(k, past_k, wide), _heads(v, past_v, wide)
    past = 0 if past_k is None else past_k.shape[1]
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for index, group in enumerate(_groups(q, past_k, window)):
        tile_q, tile_k = take_queries(queries, group), take_keys(keys, group)
        p = None
        if kept:
            p, kept[index] = kept[index], None
        if p is None:
            mask = _mask(group, window, queries.shape[2], queries)
            p = core.probabilities(tile_q, tile_k, mask, take_queries(lse, group))
        skip = 0 if want_past else max(0, past - group.key_start)
        grad_q, grad_k, grad_v = core.backward(
            tile_q,
            tile_k,
            take_keys(values, group),
            p,
            take_queries(outs, group),
            take_queries(d_outs, group),
            skip,
        )
        put_queries(dq, group, grad_q)
        add_keys(dk, group, grad_k, skip)
        add_keys(dv, group, grad_v, skip)
    dk, dv = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
    past_grads = (dk[:, :past], dv[:, :past]) if want_past else (None, None)
    return merge_query_heads(dq).to(q.dtype), dk[:, past:], dv[:, past:], *past_grads


def pair_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
    saved: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, list[PairScores | None]]:
    """(output pair [2, b, T, n, d], output and tangent before rounding, the tiles' scores).

    saved = (output, log-sum-exp) of the same inputs.
    """
    wide = accumulation_dtype(q.dtype)
    heads = k.shape[3]
    queries, dot_queries = (split_query_heads(x, heads) for x in q.to(wide))
    keys, values = _heads(k[0], past_k, wide), _heads(v[0], past_v, wide)
    dot_keys, dot_values = _heads(k[1], None, wide), _heads(v[1], None, wide)
    past = keys.shape[2] - dot_keys.shape[2]
    out, dot_out = torch.empty_like(queries), torch.empty_like(queries)
    saved_out = None if saved is None else split_query_heads(saved[0].to(wide), heads)
    kept: list[PairScores | None] = []
    for group in _groups(q[0], past_k, window):
        mask = _mask(group, window, queries.shape[2], queries)
        tile_q, tile_k = take_queries(queries, group), take_keys(keys, group)
        if saved is None:
            p, _ = core.softmax_rows(core.scores(tile_q, tile_k, mask))
        else:
            p = core.probabilities(tile_q, tile_k, mask, take_queries(saved[1], group))
        own = max(0, past - group.key_start)
        tile_out, tile_dot_out, scores = core.pair_forward(
            tile_q,
            take_queries(dot_queries, group),
            tile_k,
            take_keys(dot_keys, _own_keys(group, past)),
            take_keys(values, group),
            take_keys(dot_values, _own_keys(group, past)),
            p,
            None if saved_out is None else take_queries(saved_out, group),
            own,
        )
        put_queries(out, group, tile_out)
        put_queries(dot_out, group, tile_dot_out)
        kept.append(scores)
    result = torch.stack((merge_query_heads(out), merge_query_heads(dot_out))).to(q.dtype)
    return result, out, dot_out, kept


def pair_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
    out: Tensor,
    dot_out: Tensor,
    cotangent: Tensor,
    known: tuple[Tensor, Tensor, Tensor] | None,
    want_past: bool,
    kept: list[PairScores | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv as pairs, d past_k, d past_v); the last two None unless wanted.

    Takes the scores out of `kept`, and forms them again where they are gone.
    """
    wide, heads = out.dtype, k.shape[3]
    past = 0 if past_k is None else past_k.shape[1]
    queries, dot_queries = (split_query_heads(x, heads) for x in q.to(wide))
    d_out, e = (split_query_heads(x, heads) for x in cotangent.to(wide))
    keys, values = _heads(k[0], past_k, wide), _heads(v[0], past_v, wide)
    dot_keys, dot_values = _heads(k[1], None, wide), _heads(v[1], None, wide)
    dq, ddot_q = torch.empty_like(queries), torch.empty_like(queries)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    ddot_k, ddot_v = torch.zeros_like(dot_keys), torch.zeros_like(dot_values)
    for index, group in enumerate(_groups(q[0], past_k, window)):
        own, own_group = max(0, past - group.key_start), _own_keys(group, past)
        skip = 0 if past == 0 or want_past else own
        tile_q, tile_dot_q = take_queries(queries, group), take_queries(dot_queries, group)
        tile_k, tile_dot_k = take_keys(keys, group), take_keys(dot_keys, own_group)
        scores, kept[index] = kept[index], None
        if scores is None:
            mask = _mask(group, window, queries.shape[2], queries)
            p, _ = core.softmax_rows(core.scores(tile_q, tile_k, mask))
            scores, _ = core.pair_scores(tile_q, tile_dot_q, tile_k, tile_dot_k, p, own)
        grads = core.pair_backward(
            tile_q,
            tile_dot_q,
            tile_k,
            tile_dot_k,
            take_keys(values, group),
            take_keys(dot_values, own_group),
            scores,
            take_queries(out, group),
            take_queries(dot_out, group),
            take_queries(d_out, group),
            take_queries(e, group),
            own,
            skip,
            known is not None,
        )
        put_queries(dq, group, grads.q)
        add_keys(dk, group, grads.k, skip)
        add_keys(dv, group, grads.v, skip)
        if grads.dot_q is not None and grads.dot_k is not None and grads.dot_v is not None:
            put_queries(ddot_q, group, grads.dot_q)
            add_keys(ddot_k, own_group, grads.dot_k)
            add_keys(ddot_v, own_group, grads.dot_v)
    dk, dv = dk.transpose(1, 2), dv.transpose(1, 2)
    tangents = known
    if tangents is None:
        tangents = merge_query_heads(ddot_q), ddot_k.transpose(1, 2), ddot_v.transpose(1, 2)
    primals = (merge_query_heads(dq), dk[:, past:], dv[:, past:])
    first, second, third = (
        torch.stack((a, b.to(wide))).to(q.dtype) for a, b in zip(primals, tangents, strict=True)
    )
    if past_k is None or not want_past:
        return first, second, third, None, None
    return first, second, third, dk[:, :past].to(q.dtype), dv[:, :past].to(q.dtype)


def _own_keys(group: TileGroup, past: int) -> TileGroup:
    """The group's keys that lie after the cache, numbered from the cache's end.

    With a cache, groups hold one tile each, so cutting the first keys off is well defined.
    """
    own = max(0, past - group.key_start)
    return TileGroup(
        group.query_start,
        group.rows,
        group.key_start + own - past,
        group.span - own,
        group.shift - own,
        group.count,
    )
