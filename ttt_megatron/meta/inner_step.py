"""One inner step: clipped SGD on the fast weights of every sequence, and its adjoint.

Fast weights are a flat list of float32 (float64) tensors [b, out, in]; norms and products are
taken over the whole list, per sequence.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import ttt_kernels
from ttt_megatron.model.mlp import FastMLP


def flatten(mlps: Sequence[FastMLP]) -> list[Tensor]:
    """[fc1, fc2] of every prime MLP, in order."""
    return [weight for mlp in mlps for weight in mlp]


def as_mlps(weights: Sequence[Tensor]) -> list[FastMLP]:
    """The inverse of `flatten`."""
    return [FastMLP(*weights[i : i + 2]) for i in range(0, len(weights), 2)]


def for_sequences(weights: Sequence[Tensor], batch: int) -> list[Tensor]:
    """A copy of the initial weights for each sequence: [out, in] → [b, out, in]."""
    return [w.detach().expand(batch, *w.shape).clone() for w in weights]


SumParts = Callable[[Tensor], Tensor]
"""Adds a tensor over the processes that hold parts of the fast weights."""


def product(a: Sequence[Tensor], b: Sequence[Tensor], sum_parts: SumParts) -> Tensor:
    """⟨a, b⟩ over the whole list and all parts, per sequence: [b]."""
    return sum_parts(ttt_kernels.sequence_products(a, b))


def norm(a: Sequence[Tensor], sum_parts: SumParts) -> Tensor:
    """‖a‖ over the whole list and all parts, per sequence: [b]."""
    return product(a, a, sum_parts).sqrt()


def clip_factor(gradient_norm: Tensor, clip: float) -> Tensor:
    """min(1, clip/‖g‖), and 1 where clip is 0 or the gradient vanishes: [b]."""
    return ttt_kernels.clip_factor(gradient_norm, clip)


def step_(weights: Sequence[Tensor], gradient: Sequence[Tensor], rate: Tensor) -> None:
    """w ← w − rate·g in place; rate [b] is the learning rate times the clip factor."""
    ttt_kernels.add_scaled_(weights, gradient, rate, sign=-1)


def undo_step_(weights: Sequence[Tensor], gradient: Sequence[Tensor], rate: Tensor) -> None:
    """w ← w + rate·g in place: the weights before `step_`, up to rounding."""
    ttt_kernels.add_scaled_(weights, gradient, rate)


def clip_adjoint(
    v: Sequence[Tensor],
    gradient: Sequence[Tensor],
    gradient_norm: Tensor,
    clip: float,
    sum_parts: SumParts,
) -> list[Tensor]:
    """The transpose of the derivative of g ↦ clipped g, applied to v.

    v itself where the step was not clipped; otherwise s (v − g ⟨g, v⟩/‖g‖²): a clipped step has
    a fixed length, so the radial part of a perturbation is lost.
    """
    if clip == 0.0:
        return list(v)
    clipped = gradient_norm >= clip
    factor = clip_factor(gradient_norm, clip)
    safe = torch.where(clipped, gradient_norm, 1.0)
    radial = torch.where(clipped, factor * product(gradient, v, sum_parts) / safe.square(), 0.0)
    return ttt_kernels.scaled_differences(v, factor, gradient, radial)
