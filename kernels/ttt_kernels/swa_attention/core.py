"""The formulas of attention on one batch of tiles.

Shapes: queries and row results [B, R, d], keys and values [B, S, d], scores [B, R, S], row
statistics [B, R, 1]. `own` is the number of leading keys that come from a cache: those have no
tangent. c = d^(−1/2).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PairScores(NamedTuple):
    """What the forward pass of a pair leaves for its backward pass."""

    p: Tensor
    dot_s: Tensor
    mu: Tensor


def scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """c·q kᵀ + mask."""
    return torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5)


def probabilities(q: Tensor, k: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
    """exp(c·q kᵀ − lse)."""
    return scores(q, k, mask).sub_(lse).exp_()


def softmax_rows(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, in place, with the rows' log-sum-exp."""
    highest = s.amax(dim=-1, keepdim=True)
    p = s.sub_(highest).exp_()
    total = p.sum(dim=-1, keepdim=True)
    p.div_(total)
    return p, highest.add_(total.log_())


def backward(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, out: Tensor, d_out: Tensor, own: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); dk and dv for the keys after the first `own` only."""
    c = q.shape[-1] ** -0.5
    row = torch.linalg.vecdot(d_out, out).unsqueeze(-1)
    ds = torch.bmm(d_out, v.mT).sub_(row).mul_(p)
    dq = torch.bmm(ds, k).mul_(c)
    dk = torch.bmm(ds[:, :, own:].mT, q).mul_(c)
    dv = torch.bmm(p[:, :, own:].mT, d_out)
    return dq, dk, dv


def pair_scores(
    q: Tensor, dot_q: Tensor, k: Tensor, dot_k: Tensor, p: Tensor, own: int
) -> tuple[PairScores, Tensor]:
    """The scores' tangents with the probabilities p, and p∘Ṡ.

    dot_k belongs to the keys after the first `own`.
    """
    dot_s = torch.bmm(dot_q, k.mT)
    dot_s[:, :, own:].baddbmm_(q, dot_k.mT)
    dot_s.mul_(q.shape[-1] ** -0.5)
    weighted = p * dot_s
    return PairScores(p, dot_s, weighted.sum(dim=-1, keepdim=True)), weighted


def pair_forward(
    q: Tensor,
    dot_q: Tensor,
    k: Tensor,
    dot_k: Tensor,
    v: Tensor,
    dot_v: Tensor,
    p: Tensor,
    out: Tensor | None,
    own: int,
) -> tuple[Tensor, Tensor, PairScores]:
    """(O, Ȯ, what the backward pass needs) from the probabilities p; O only if not given.

    dot_k and dot_v belong to the keys after the first `own`.
    """
    kept, weighted = pair_scores(q, dot_q, k, dot_k, p, own)
    if out is None:
        out = torch.bmm(p, v)
    dot_out = torch.bmm(weighted, v).addcmul_(kept.mu, out, value=-1)
    dot_out.baddbmm_(p[:, :, own:], dot_v)
    return out, dot_out, kept


class PairGradients(NamedTuple):
    """Cotangents of a pair's inputs; dot_k and dot_v for own keys; dot_* None when known."""

    q: Tensor
    dot_q: Tensor | None
    k: Tensor
    dot_k: Tensor | None
    v: Tensor
    dot_v: Tensor | None


def pair_backward(
    q: Tensor,
    dot_q: Tensor,
    k: Tensor,
    dot_k: Tensor,
    v: Tensor,
    dot_v: Tensor,
    kept: PairScores,
    out: Tensor,
    dot_out: Tensor,
    d_out: Tensor,
    e: Tensor,
    own: int,
    skip: int,
    tangents_known: bool,
) -> PairGradients:
    """Cotangents from d_out (of O) and e (of Ȯ).

    k and v gradients are formed for the keys after the first `skip` (0, or `own` where cached
    keys need none). The formulas are those of the double backward of softmax attention.
    """
    c = q.shape[-1] ** -0.5
    p, dot_s, mu = kept
    gamma = torch.linalg.vecdot(e, out).unsqueeze(-1)
    delta = torch.linalg.vecdot(d_out, out) + torch.linalg.vecdot(e, dot_out)
    g = torch.bmm(e, v.mT).sub_(gamma)
    centred = dot_s - mu
    ds = torch.bmm(d_out, v.mT)
    ds[:, :, own:].baddbmm_(e, dot_v.mT)
    ds.addcmul_(g, centred).sub_(delta.unsqueeze(-1)).mul_(p)
    ddot_s = g.mul_(p)
    dq = torch.bmm(ds, k).baddbmm_(ddot_s[:, :, own:], dot_k).mul_(c)
    dk = torch.bmm(ds[:, :, skip:].mT, q).baddbmm_(ddot_s[:, :, skip:].mT, dot_q).mul_(c)
    moved = centred.mul_(p)
    dv = torch.bmm(p[:, :, skip:].mT, d_out).baddbmm_(moved[:, :, skip:].mT, e)
    if tangents_known:
        return PairGradients(dq, None, dk, None, dv, None)
    ddot_q = torch.bmm(ddot_s, k).mul_(c)
    ddot_k = torch.bmm(ddot_s[:, :, own:].mT, q).mul_(c)
    ddot_v = torch.bmm(p[:, :, own:].mT, e)
    return PairGradients(dq, ddot_q, dk, ddot_k, dv, ddot_v)
