"""The output head on CUDA: cuBLAS products over vocabulary tiles, Triton on the rows between them.

A single kernel that keeps tiles of logits on chip would have to form every logit again for each of
dh and dW, whose sums run along different axes. cuBLAS' products of tiles run near the device's rate
as they are, so what is left to win lies in how often logits are formed, and in how little is done
to them in between (`triton_rows`).

A tile has at most ELEMENTS logits, in the tensors' dtype; no more are ever stored, unless the
weight's gradient is put off. Products of tokens × vocabulary × width:

    loss alone                       1    z
    with dh, dW not wanted           2    z; dh
    with dh and dW                   4    z; in the backward pass z again, dh, dW
    pair, cotangent of ḣ known       7    z, ż; again, dh, both parts of dW
    pair                             8    and dḣ

dh alone needs no second look at the logits: Σe^(z − maximum)·W over the tiles read so far is
rescaled as the maximum rises, and divided by Σe^(z − maximum) in the end. The target's share,
(p_t − 1)·W_t, is added apart, for a p_t near 1 would lose it in bfloat16's rounding.

Everything else is formed in the backward pass, where the loss's cotangent is known: dW, by far the
largest result, is written once and never scaled.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt_kernels.deferred import Receiver
from ttt_kernels.linear_cross_entropy.shard import VocabularyShard
from ttt_kernels.linear_cross_entropy.triton_rows import RowSums, differentiate_
from ttt_kernels.rounded import rounded

ELEMENTS = 1 << 25
"""Logits in a tile, of each of primal and tangent."""

COLUMNS = 1 << 13
"""Vocabulary rows in a tile of many tokens."""

ALIGNMENT = 128
"""Tiles are multiples of this many vocabulary rows, but for the last."""


def _cut(total: int, most: int, alignment: int) -> Iterator[slice]:
    """Slices of about equal size, at most `most` and multiples of `alignment` but for the last."""
    count = max(-(-total // most), 1)
    size = max(-(-total // count), 1)
    size = -(-size // alignment) * alignment
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _columns(tokens: int) -> int:
    """The most vocabulary rows in a tile; the same for every shard, so that reductions meet."""
    return max(COLUMNS, ELEMENTS // max(tokens, 1))


def _token_tiles(tokens: int) -> Iterator[slice]:
    return _cut(tokens, max(1, ELEMENTS // _columns(tokens)), 1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, in out's dtype: the factors', or float32."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        # No such product on the CPU, where low precision is there for tests of what surrounds it.
        out.copy_(torch.mm(a.to(out.dtype), b.to(out.dtype)))


class _Tile:
    """Logits of some tokens over parts of the vocabulary, one part at a time.

    `stacked` [c·r, H] holds r tokens' values over, of a pair (c = 2), their tangents.
    """

    def __init__(self, stacked: Tensor, matrix: Tensor, paired: bool, columns: int) -> None:
        self.stacked, self.matrix, self._paired = stacked, matrix, paired
        self.parts = list(_cut(len(matrix), columns, ALIGNMENT))
        widest = max((p.stop - p.start for p in self.parts), default=0)
        self._buffer = stacked.new_empty(len(stacked) * widest)

    def logits(self, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """All logits [c·r, w] of vocabulary rows `part`; the values', the tangents'.

        They lie where those of the part before lay.
        """
        width = part.stop - part.start
        both = self._buffer[: len(self.stacked) * width].view(-1, width)
        torch.mm(self.stacked, self.matrix[part].mT, out=both)
        if not self._paired:
            return both, both, None
        z, dot_z = both.tensor_split(2)
        return both, z, dot_z


class Losses(NamedTuple):
    """nll and log Σe^z of every token, and of a pair nll's derivative and ⟨p, ż⟩: [T] float32."""

    nll: Tensor
    lse: Tensor
    dot_nll: Tensor
    mean: Tensor


def _losses(sums: RowSums, shard: VocabularyShard) -> Losses:
    """One maximum and one sum are taken over the shards."""
    highest = shard.reduce_max(sums.highest.clone().unsqueeze(-1)).squeeze(-1)
    share = torch.exp(sums.highest - highest)
    state = (sums.total * share, sums.weighted * share, sums.held, sums.wanted, sums.dot_wanted)
    total, weighted, held, wanted, dot_wanted = shard.reduce_sum(torch.stack(state, -1)).unbind(-1)
    lse, mean = total.log() + highest, weighted / total
    nll = torch.where(held > 0, lse - wanted, torch.nan)
    return Losses(nll, lse, mean - dot_wanted, mean)


def read(
    stacked: Tensor,
    matrix: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    token_weights: Tensor | None = None,
) -> tuple[Losses, Tensor | None]:
    """Losses of stacked [c, T, H] (c = 2 for a pair) over matrix [V, H], targets [T].

    With token_weights [T], for c = 1, also the cotangent [T, H] of the weighted sum.
    """
    copies, tokens, width = stacked.shape
    found = torch.empty(4, tokens, dtype=torch.float32, device=stacked.device)
    d_hidden = None if token_weights is None else stacked.new_empty(tokens, width)
    for rows in _token_tiles(tokens):
        tile = _Tile(stacked[:, rows].flatten(0, 1), matrix, copies == 2, _columns(tokens))
        sums = RowSums(targets[rows])
        powers = (
            found.new_zeros(rows.stop - rows.start, width) if token_weights is not None else None
        )
        for part in tile.parts:
            _, z, dot_z = tile.logits(part)
            sums.read(z, dot_z, shard.first + part.start, powers is not None)
            if powers is not None:
                product = torch.empty_like(powers)
                _product(z, matrix[part], product)
                torch.addcmul(product, powers, sums.shrink.unsqueeze(-1), out=powers)
        losses = _losses(sums, shard)
        found[:, rows] = torch.stack(losses)
        if d_hidden is not None and powers is not None and token_weights is not None:
            a = token_weights[rows]
            d_hidden[rows] = _divided(powers, sums, losses.lse, matrix, a, shard)
    return Losses(*found.unbind(0)), d_hidden


def _divided(
    powers: Tensor, sums: RowSums, lse: Tensor, matrix: Tensor, a: Tensor, shard: VocabularyShard
) -> Tensor:
    """dh [r, H] = a (Σe^z·W/Σe^z − W_t), of Σe^(z − highest)·W without the target's share."""
    scaled = powers * (a * torch.exp(sums.highest - lse)).unsqueeze(-1)
    if not len(matrix):
        return torch.zeros_like(powers)
    row, inside = (x.squeeze(-1) for x in shard.locate(sums.targets, len(matrix)))
    missing = torch.where(inside, a * torch.expm1(sums.wanted - lse), 0.0)
    return torch.addcmul(scaled, matrix[row], missing.unsqueeze(-1))


class Wanted(NamedTuple):
    """Whose cotangents to form: h, ḣ, W, and all logits (`kept` [c, T, V] takes them)."""

    hidden: bool
    dot_hidden: bool
    weight: bool
    kept: Tensor | None


def gradients(
    stacked: Tensor,
    matrix: Tensor,
    targets: Tensor,
    losses: Losses,
    a: Tensor,
    b: Tensor | None,
    first: int,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None]:
    """Cotangents [c, T, H] in stacked's dtype and [V, H] in float32 of Σ a·nll + b·(d nll).

    Those not wanted are not filled, or None.
    """
    copies, tokens, width = stacked.shape
    d_hidden = stacked.new_empty(stacked.shape) if wanted.hidden else None
    d_weight = a.new_empty(matrix.shape) if wanted.weight else None
    if d_weight is not None and not tokens:
        d_weight.zero_()
    for rows in _token_tiles(tokens):
        count = rows.stop - rows.start
        formed = count * (2 if wanted.dot_hidden else 1)
        tile = _Tile(stacked[:, rows].flatten(0, 1), matrix, copies == 2, _columns(tokens))
        own = [x[rows] for x in (targets, losses.lse, losses.mean, a)]
        own_b = None if b is None else b[rows]
        sums = None if d_hidden is None else a.new_zeros(formed, width)
        for part in tile.parts:
            both, z, dot_z = tile.logits(part)
            differentiate_(z, dot_z, own, own_b, first + part.start)
            if sums is not None:
                product = torch.empty_like(sums)
                _product(both[:formed], matrix[part], product)
                sums += product
            if d_weight is not None and rows.start == 0:
                _product(both.mT, tile.stacked, d_weight[part])
            elif d_weight is not None:
                product = torch.empty_like(d_weight[part])
                _product(both.mT, tile.stacked, product)
                d_weight[part] += product
            if wanted.kept is not None:
                wanted.kept[:, rows, part] = both.unflatten(0, (copies, count))
        if d_hidden is not None and sums is not None:
            d_hidden[: formed // count, rows] = sums.unflatten(0, (-1, count))
    return d_hidden, d_weight


def _as_weights(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


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
        matrix, a = rounded(weight, hidden.dtype), _as_weights(token_weights)
        targets, stacked = targets.contiguous(), hidden.unsqueeze(0)
        want_hidden = needs_grad and ctx.needs_input_grad[0]
        alone = want_hidden and not ctx.needs_input_grad[1] and put_off is None
        losses, ctx.d_hidden = read(stacked, matrix, targets, shard, a if alone else None)
        if needs_grad and not alone:
            ctx.save_for_backward(hidden, matrix, targets, a, *losses)
            ctx.first, ctx.put_off, ctx.weight_dtype = shard.first, put_off, weight.dtype
        ctx.mark_non_differentiable(losses.nll)
        return (losses.nll * a).sum(), losses.nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.d_hidden is not None:
            return ctx.d_hidden * d_loss, *[None] * 6
        hidden, matrix, targets, a, *losses = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        kept = None if ctx.put_off is None else hidden.new_empty(1, len(hidden), len(matrix))
        wanted = Wanted(want_hidden, False, want_weight, kept)
        d_hidden, d_weight = gradients(
            hidden.unsqueeze(0),
            matrix,
            targets,
            Losses(*losses),
            a * d_loss,
            None,
            ctx.first,
            wanted,
        )
        if kept is not None:
            ctx.put_off.add(kept.squeeze(0), hidden)
        if d_weight is not None:
            d_weight = d_weight.to(ctx.weight_dtype)
        return None if d_hidden is None else d_hidden.squeeze(0), d_weight, *[None] * 5


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
        matrix, targets = rounded(weight, pair.dtype), targets.contiguous()
        a, b = _as_weights(loss_weights), _as_weights(derivative_weights)
        losses, _ = read(pair, matrix, targets, shard)
        ctx.save_for_backward(pair, matrix, targets, a, b, dot_adjoint, *losses)
        ctx.first, ctx.put_off, ctx.weight_dtype = shard.first, put_off, weight.dtype
        return (a * losses.nll + b * losses.dot_nll).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        pair, matrix, targets, a, b, dot_adjoint, *losses = ctx.saved_tensors
        want_pair, want_weight = ctx.needs_input_grad[:2]
        kept = None if ctx.put_off is None else pair.new_empty(*pair.shape[:2], len(matrix))
        wanted = Wanted(want_pair, want_pair and dot_adjoint is None, want_weight, kept)
        scaled = a * d_total, b * d_total
        grad, d_weight = gradients(
            pair, matrix, targets, Losses(*losses), *scaled, ctx.first, wanted
        )
        if grad is not None and dot_adjoint is not None:
            torch.mul(dot_adjoint, d_total, out=grad[1])
        if kept is not None:
            ctx.put_off.add(kept.flatten(0, 1), pair.flatten(0, 1))
        if d_weight is not None:
            d_weight = d_weight.to(ctx.weight_dtype)
        return grad, d_weight, *[None] * 6
