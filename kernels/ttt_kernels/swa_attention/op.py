"""`swa_attention` and `swa_attention_pair`: sliding-window attention tile by tile.

Only keys inside the window are visited and no score matrix outlives its tile, except in a pair
and over a cache: there one chunk's scores are kept from the forward to the backward pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_kernels.dtypes import accumulation_dtype
from ttt_kernels.mode import uses_plain_definitions
from ttt_kernels.swa_attention import core
from ttt_kernels.swa_attention.reference import swa_attention_reference
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


class SavedAttention(NamedTuple):
    """A forward pass's output [b, T, n, d] and log-sum-exp [b, n_kv, r, T, 1]."""

    out: Tensor
    lse: Tensor


class KnownAdjoints(NamedTuple):
    """Cotangents of the tangents of q, k and v, where the forward sweep has them already."""

    q: Tensor
    k: Tensor
    v: Tensor


def _heads(x: Tensor, past: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[b, P + T, n_kv, d] as [b, n_kv, P + T, d], contiguous, in the accumulation dtype."""
    whole = x if past is None else torch.cat((past, x), dim=1)
    return whole.transpose(1, 2).to(dtype).contiguous()


def _mask(group: TileGroup, window: int | None, repeats: int, like: Tensor) -> Tensor:
    return additive_mask(
        group.rows, group.span, group.shift, window, repeats, like.dtype, like.device
    )


class _SwaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(q.dtype)
        queries = split_query_heads(q.to(wide), k.shape[2])
        keys, values = _heads(k, past_k, wide), _heads(v, past_v, wide)
        groups = tile_groups(
            q.shape[1], keys.shape[2], window, q.shape[0] * q.shape[2], past_k is None
        )
        out = torch.empty_like(queries)
        lse = queries.new_empty(*queries.shape[:-1], 1)
        ctx.kept = []
        for group in groups:
            mask = _mask(group, window, queries.shape[2], queries)
            s = core.scores(take_queries(queries, group), take_keys(keys, group), mask)
            p, row_lse = core.softmax_rows(s)
            put_queries(out, group, torch.bmm(p, take_keys(values, group)))
            put_queries(lse, group, row_lse)
            if past_k is not None:
                ctx.kept.append(p)
        result = merge_query_heads(out).to(q.dtype)
        ctx.save_for_backward(q, k, v, past_k, past_v, result, lse)
        ctx.window, ctx.groups = window, groups
        ctx.mark_non_differentiable(lse)
        return result, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_result: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, past_k, past_v, result, lse = ctx.saved_tensors
        wide = accumulation_dtype(q.dtype)
        queries, out, d_out = (
            split_query_heads(x.to(wide), k.shape[2]) for x in (q, result, d_result)
        )
        keys, values = _heads(k, past_k, wide), _heads(v, past_v, wide)
        past = 0 if past_k is None else past_k.shape[1]
        want_past = ctx.needs_input_grad[3]
        dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for index, group in enumerate(ctx.groups):
            tile_q, tile_k = take_queries(queries, group), take_keys(keys, group)
            if ctx.kept:
                p, ctx.kept[index] = ctx.kept[index], None
            else:
                mask = _mask(group, ctx.window, queries.shape[2], queries)
                p = core.probabilities(tile_q, tile_k, mask, take_queries(lse, group))
            skip = 0 if want_past else max(0, past - group.key_start)
            grad_q, grad_k, grad_v = core.backward(
                tile_q,
                tile_k,
                take_keys(values, group),
                p,
                take_queries(out, group),
                take_queries(d_out, group),
                skip,
            )
            put_queries(dq, group, grad_q)
            add_keys(dk, group, grad_k, skip)
            add_keys(dv, group, grad_v, skip)
        dk, dv = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
        past_grads = (dk[:, :past], dv[:, :past]) if want_past else (None, None)
        return merge_query_heads(dq).to(q.dtype), dk[:, past:], dv[:, past:], *past_grads, None


def swa_attention_saved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> SavedAttention:
    """`swa_attention` together with what a later pair pass over the same inputs can reuse."""
    return SavedAttention(*_SwaAttention.apply(q, k, v, past_k, past_v, window))


def swa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> Tensor:
    """Causal attention in which a query sees the `window` last keys, its own included.

    Shapes: q [b, T, n, d], k and v [b, T, n_kv, d] (n_kv divides n), past_k and past_v
    [b, P, n_kv, d]: the keys just before k, without those no query can see. `window` None is
    full attention. Result [b, T, n, d], in q's dtype.
    """
    if uses_plain_definitions():
        return swa_attention_reference(q, k, v, window, past_k, past_v)
    return swa_attention_saved(q, k, v, window, past_k, past_v).out


class _SwaAttentionPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor | None,
        past_v: Tensor | None,
        window: int | None,
        saved: SavedAttention | None,
        known: KnownAdjoints | None,
    ) -> Tensor:
        wide = accumulation_dtype(q.dtype)
        heads = k.shape[3]
        queries, dot_queries = (split_query_heads(x, heads) for x in q.to(wide))
        keys, values = _heads(k[0], past_k, wide), _heads(v[0], past_v, wide)
        dot_keys, dot_values = _heads(k[1], None, wide), _heads(v[1], None, wide)
        past = keys.shape[2] - dot_keys.shape[2]
        groups = tile_groups(
            q.shape[2], keys.shape[2], window, q.shape[1] * q.shape[3], past_k is None
        )
        out, dot_out = torch.empty_like(queries), torch.empty_like(queries)
        saved_out = None if saved is None else split_query_heads(saved.out.to(wide), heads)
        ctx.kept = []
        for group in groups:
            mask = _mask(group, window, queries.shape[2], queries)
            tile_q, tile_k = take_queries(queries, group), take_keys(keys, group)
            if saved is None:
                p, _ = core.softmax_rows(core.scores(tile_q, tile_k, mask))
            else:
                p = core.probabilities(tile_q, tile_k, mask, take_queries(saved.lse, group))
            own = max(0, past - group.key_start)
            tile_out, tile_dot_out, kept = core.pair_forward(
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
            ctx.kept.append(kept)
        ctx.save_for_backward(q, k, v, past_k, past_v, out, dot_out)
        ctx.groups, ctx.past, ctx.known = groups, past, known
        return torch.stack((merge_query_heads(out), merge_query_heads(dot_out))).to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, past_k, past_v, out, dot_out = ctx.saved_tensors
        wide, past, heads = out.dtype, ctx.past, k.shape[3]
        queries, dot_queries = (split_query_heads(x, heads) for x in q.to(wide))
        d_out, e = (split_query_heads(x, heads) for x in cotangent.to(wide))
        keys, values = _heads(k[0], past_k, wide), _heads(v[0], past_v, wide)
        dot_keys, dot_values = _heads(k[1], None, wide), _heads(v[1], None, wide)
        dq, ddot_q = torch.empty_like(queries), torch.empty_like(queries)
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        ddot_k, ddot_v = torch.zeros_like(dot_keys), torch.zeros_like(dot_values)
        for index, group in enumerate(ctx.groups):
            own, own_group = max(0, past - group.key_start), _own_keys(group, past)
            skip = 0 if past == 0 or ctx.needs_input_grad[3] else own
            kept, ctx.kept[index] = ctx.kept[index], None
            grads = core.pair_backward(
                take_queries(queries, group),
                take_queries(dot_queries, group),
                take_keys(keys, group),
                take_keys(dot_keys, own_group),
                take_keys(values, group),
                take_keys(dot_values, own_group),
                kept,
                take_queries(out, group),
                take_queries(dot_out, group),
                take_queries(d_out, group),
                take_queries(e, group),
                own,
                skip,
                ctx.known is not None,
            )
            put_queries(dq, group, grads.q)
            add_keys(dk, group, grads.k, skip)
            add_keys(dv, group, grads.v, skip)
            if grads.dot_q is not None and grads.dot_k is not None and grads.dot_v is not None:
                put_queries(ddot_q, group, grads.dot_q)
                add_keys(ddot_k, own_group, grads.dot_k)
                add_keys(ddot_v, own_group, grads.dot_v)
        dk, dv = dk.transpose(1, 2), dv.transpose(1, 2)
        tangents = (
            (merge_query_heads(ddot_q), ddot_k.transpose(1, 2), ddot_v.transpose(1, 2))
            if ctx.known is None
            else ctx.known
        )
        primals = (merge_query_heads(dq), dk[:, past:], dv[:, past:])
        pairs = [
            torch.stack((a, b.to(wide))).to(q.dtype) for a, b in zip(primals, tangents, strict=True)
        ]
        past_grads: tuple[Tensor | None, Tensor | None] = (None, None)
        if past_k is not None and ctx.needs_input_grad[3]:
            past_grads = (dk[:, :past].to(q.dtype), dv[:, :past].to(q.dtype))
        return *pairs, *past_grads, None, None, None


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


def swa_attention_pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    saved: SavedAttention | None = None,
    known: KnownAdjoints | None = None,
) -> Tensor:
    """`swa_attention` and its directional derivative; cached keys have no tangent.

    Shapes: q [2, b, T, n, d], k and v [2, b, T, n_kv, d], past_k and past_v [b, P, n_kv, d];
    result [2, b, T, n, d]. `saved` (of the same inputs) spares recomputing the output, `known`
    the cotangents of the tangents.
    """
    result: Tensor = _SwaAttentionPair.apply(q, k, v, past_k, past_v, window, saved, known)
    return result
