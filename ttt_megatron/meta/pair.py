"""Pairs of a primal and a tangent, and what every operation of the model does with them.

A pair is an ordinary tensor with a leading axis of 2, and its operations have ordinary
first-order backwards: the derivative along the tangent is taken by writing it down, so whatever
autograd does on top of it is first order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ttt_kernels
from ttt_kernels.swa_attention.op import KnownAdjoints, SavedAttention, swa_attention_pair
from ttt_megatron.meta.tape import Playback
from ttt_megatron.model import ops


@dataclass(frozen=True)
class Pair:
    """A primal value and its tangent: stacked [2, …]; playback is what the forward sweep kept."""

    stacked: Tensor
    playback: Playback

    def like(self, stacked: Tensor) -> "Pair":
        """Another pair of the same pass."""
        return Pair(stacked, self.playback)


@dataclass(frozen=True)
class MovingWeight:
    """A fast weight [b, out, in] and the direction it moves in, a constant of the same shape."""

    weight: Tensor
    direction: Tensor
    playback: Playback


@ops.primal.rule(Pair)
def _primal(x: Pair) -> Tensor:
    return x.stacked[0]


@ops.add.rule(Pair)
def _add(x: Pair | Tensor, y: Pair | Tensor) -> Pair:
    if isinstance(x, Pair) and isinstance(y, Pair):
        return x.like(x.stacked + y.stacked)
    moving, still = (x, y) if isinstance(x, Pair) else (y, x)
    assert isinstance(moving, Pair)
    assert isinstance(still, Tensor)
    primal, tangent = moving.stacked.unbind(0)
    return moving.like(torch.stack((primal + still, tangent)))


@ops.linear.rule(Pair)
def _linear(x: Pair, weight: Tensor) -> Pair:
    kept = x.playback.next()
    return x.like(ttt_kernels.linear_pair(x.stacked, weight, kept.output, kept.dot_input()))


@ops.fast_linear.rule(MovingWeight)
def _fast_linear(x: Pair | Tensor, weight: MovingWeight) -> Pair:
    kept = weight.playback.next()
    stacked = ttt_kernels.fast_linear_pair(
        x.stacked if isinstance(x, Pair) else x,
        weight.weight,
        weight.direction,
        kept.output,
        kept.dot_input(),
    )
    return Pair(stacked, weight.playback)


@ops.fast_linear.rule(Pair)
def _fast_linear_of_pair(x: Pair, weight: MovingWeight) -> Pair:
    return _fast_linear(x, weight)


@ops.rms_norm.rule(Pair)
def _rms_norm(x: Pair, gain: Tensor, *, eps: float) -> Pair:
    return x.like(ttt_kernels.rms_norm_pair(x.stacked, gain, eps))


@ops.swiglu.rule(Pair)
def _swiglu(gate_up: Pair) -> Pair:
    return gate_up.like(ttt_kernels.swiglu_pair(gate_up.stacked))


@ops.rope.rule(Pair)
def _rope(x: Pair, rotation: Tensor) -> Pair:
    return x.like(ttt_kernels.rope(x.stacked, rotation))


@ops.split_heads.rule(Pair)
def _split_heads(qkv: Pair, **shape: int) -> tuple[Pair, ...]:
    return tuple(qkv.like(part) for part in ops.split_heads(qkv.stacked, **shape))


@ops.map_tokens.rule(Pair)
def _map_tokens(x: Pair, function: Callable[[Tensor], Tensor]) -> Pair:
    return x.like(function(x.stacked))


@ops.merge_heads.rule(Pair)
def _merge_heads(x: Pair) -> Pair:
    return x.like(ops.merge_heads(x.stacked))


@ops.attention.rule(Pair)
def _attention(
    q: Pair, k: Pair, v: Pair, past_k: Tensor | None, past_v: Tensor | None, **settings: Any
) -> Pair:
    kept = q.playback.next()
    saved = known = None
    if kept.output is not None and kept.lse is not None:
        saved = SavedAttention(kept.output, kept.lse)
    dots = [kept.dot_input(i) for i in range(3)]
    if dots[0] is not None and dots[1] is not None and dots[2] is not None:
        known = KnownAdjoints(dots[0], dots[1], dots[2])
    return q.like(
        swa_attention_pair(
            q.stacked,
            k.stacked,
            v.stacked,
            past_k=past_k,
            past_v=past_v,
            saved=saved,
            known=known,
            **settings,
        )
    )
