"""The output head in plain PyTorch, tile by tile over tokens; logits never outlive their tile.

Gradients are formed together with the loss and scaled by its cotangent later; where the weight's is
put off, the logits' cotangents of all tokens are kept for it instead. The formulas are those of
`op.py`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_kernels.deferred import Receiver
from ttt_kernels.dtypes import accumulation_dtype
from ttt_kernels.linear_cross_entropy.shard import VocabularyShard
from ttt_kernels.rounded import rounded

MAX_TILE_ELEMENTS = 1 << 21


def _token_tiles(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, MAX_TILE_ELEMENTS // max(1, vocabulary))
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))


class _Rows(NamedTuple):
    """Softmax of a tile of tokens over one shard: p [t, V], nll [t], and where the targets are."""

    p: Tensor
    nll: Tensor
    target: Tensor
    inside: Tensor
    mean: Tensor | None
    dot_nll: Tensor | None

    def add_at_targets_(self, x: Tensor, values: Tensor) -> Tensor:
        """Add values [t, 1] to x [t, V] at the targets that this shard has."""
        return x.scatter_add_(-1, self.target, values * self.inside) if x.shape[-1] else x


def _at_targets(x: Tensor, target: Tensor, inside: Tensor) -> Tensor:
    """Entries of x [t, V] at the targets, 0 where another shard has them: [t, 1]."""
    found = x.gather(-1, target) if x.shape[-1] else x.new_zeros(len(x), 1)
    return torch.where(inside, found, 0)


def _softmax(
    logits: Tensor, targets: Tensor, shard: VocabularyShard, dot_logits: Tensor | None = None
) -> _Rows:
    """Softmax in place of the logits; with a tangent also ⟨p, ż⟩ [t, 1] and ⟨p, ż⟩ − ż_t [t].

    One maximum and one sum are taken over the shards.
    """
    target, inside = shard.locate(targets, logits.shape[-1])
    wanted = _at_targets(logits, target, inside)
    # An empty shard has no maximum of its own.
    lowest = logits.new_full((len(logits), 1), -torch.inf)
    own = logits.amax(dim=-1, keepdim=True) if logits.shape[-1] else lowest
    highest = shard.reduce_max(own)
    p = logits.sub_(highest).exp_()
    parts = [p.sum(dim=-1, keepdim=True), wanted, inside.to(p.dtype)]
    if dot_logits is not None:
        parts.append(torch.linalg.vecdot(p, dot_logits).unsqueeze(-1))
        parts.append(_at_targets(dot_logits, target, inside))
    total, wanted, held, *dots = shard.reduce_sum(torch.cat(parts, dim=-1)).split(1, dim=-1)
    wanted = torch.where(held > 0, wanted, torch.nan)
    nll = (total.log() + highest - wanted).squeeze(-1)
    p.div_(total)
    if not dots:
        return _Rows(p, nll, target, inside, None, None)
    mean = dots[0] / total
    return _Rows(p, nll, target, inside, mean, (mean - dots[1]).squeeze(-1))


def _take(ctx: Any) -> tuple[Any, Any]:
    """The gradients formed with the value, which the first backward pass scales in place."""
    if ctx.gradients is None:
        raise RuntimeError(
            "The head's backward pass may run once: its gradients are formed with the loss and"
            " scaled in place. Compute the loss again for another one."
        )
    taken = ctx.gradients, ctx.put_off
    ctx.gradients = ctx.put_off = None
    return taken


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden [T, H], weight [V, H], targets [T], token_weights [T], …) → (loss, nll [T])."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        shard: VocabularyShard,
        needs_grad: bool,
        put_off: Receiver | None,
    ) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(hidden.dtype)
        matrix = rounded(weight, hidden.dtype)
        nll = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        want_hidden = needs_grad and ctx.needs_input_grad[0]
        want_weight = needs_grad and ctx.needs_input_grad[1]
        d_hidden = hidden.new_empty(hidden.shape) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        kept = None if put_off is None else hidden.new_empty(len(hidden), len(weight))
        for rows in _token_tiles(hidden.shape[0], shard.largest or weight.shape[0]):
            logits = torch.mm(hidden[rows], matrix.mT).to(wide)
            tile = _softmax(logits, targets[rows], shard)
            nll[rows] = tile.nll
            if not (want_hidden or want_weight):
                continue
            tile.add_at_targets_(tile.p, tile.p.new_full((len(tile.p), 1), -1.0))
            d_logits = tile.p.mul_(token_weights[rows].unsqueeze(-1)).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, matrix, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += torch.mm(d_logits.mT, hidden[rows])
            if kept is not None:
                kept[rows] = d_logits
        ctx.gradients = d_hidden, d_weight
        ctx.put_off = None if put_off is None else (put_off, kept, hidden)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden, d_weight), put_off = _take(ctx)
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(d_loss)
        if d_weight is not None:
            d_weight = d_weight.mul_(d_loss).to(ctx.weight_dtype)
        if put_off is not None:
            put_off[0].add(*put_off[1:], d_loss)
        return d_hidden, d_weight, *[None] * 5


class LinearCrossEntropyPair(torch.autograd.Function):
    """(pair [2, T, H], weight [V, H], targets [T], a and b [T], …) → Σ a·nll + b·(d nll)."""

    @staticmethod
    def forward(
        ctx: Any,
        pair: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        derivative_weights: Tensor,
        dot_adjoint: Tensor | None,
        shard: VocabularyShard,
        put_off: Receiver | None,
    ) -> Tensor:
        wide = accumulation_dtype(pair.dtype)
        matrix = rounded(weight, pair.dtype)
        grad = torch.empty_like(pair, memory_format=torch.contiguous_format)
        kept = d_weight = None
        if put_off is None:
            d_weight = torch.zeros_like(weight, dtype=wide)
        else:
            kept = pair.new_empty(*pair.shape[:2], len(weight))
        total = torch.zeros((), dtype=wide, device=pair.device)
        for rows in _token_tiles(pair.shape[1], shard.largest or weight.shape[0]):
            a, b = loss_weights[rows].unsqueeze(-1), derivative_weights[rows].unsqueeze(-1)
            logits = torch.mm(pair[0, rows], matrix.mT).to(wide)
            dot_logits = torch.mm(pair[1, rows], matrix.mT).to(wide)
            tile = _softmax(logits, targets[rows], shard, dot_logits)
            assert tile.mean is not None
            assert tile.dot_nll is not None
            total += (a.squeeze(-1) * tile.nll).sum() + (b.squeeze(-1) * tile.dot_nll).sum()
            d_logits = torch.mul(dot_logits.sub_(tile.mean).mul_(b).add_(a), tile.p)
            tile.add_at_targets_(d_logits, -a.to(wide))
            d_dot_logits = tile.add_at_targets_(tile.p.mul_(b), -b.to(wide)).to(pair.dtype)
            d_logits = d_logits.to(pair.dtype)
            torch.mm(d_logits, matrix, out=grad[0, rows])
            if dot_adjoint is None:
                torch.mm(d_dot_logits, matrix, out=grad[1, rows])
            if kept is not None:
                kept[0, rows], kept[1, rows] = d_logits, d_dot_logits
            elif d_weight is not None:
                product = torch.mm(d_logits.mT, pair[0, rows])
                d_weight += product.addmm_(d_dot_logits.mT, pair[1, rows])
        if dot_adjoint is not None:
            grad[1].copy_(dot_adjoint)
        ctx.gradients = grad, d_weight
        ctx.put_off = None if put_off is None else (put_off, kept, pair)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (grad, d_weight), put_off = _take(ctx)
        if d_weight is not None:
            d_weight = d_weight.mul_(d_total).to(ctx.weight_dtype)
        if put_off is not None:
            put_off[0].add(*(x.flatten(0, 1) for x in put_off[1:]), d_total)
        return grad.mul_(d_total), d_weight, *[None] * 6
