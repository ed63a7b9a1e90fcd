"""Clipped gradient descent on a list of fast weights, each sequence by itself, in two passes.

The first pass sums squares over the whole list (`sequence_products` of the gradient with itself);
where processes hold parts of the weights, they add up its [b] results before the root is taken.
The second steps: w ← w − lr·min(1, clip/‖g‖)·g, with the factor read where it was formed, so that
nobody waits for the device. The adjoint of a clipped step is the same two passes:
⟨g, v⟩, then s·v − r·g.

Plain PyTorch below and in `reference.py`; on CUDA, but in float64, the passes over the weights are
Triton kernels (`triton_clipped_sgd`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.arguments import check_floats, check_shape
from ttt_kernels.clipped_sgd.reference import (
    add_scaled_reference_,
    scaled_differences_reference,
    sequence_products_reference,
)
from ttt_kernels.triton_launch import suits_triton


def _check(
    a: Sequence[Tensor], b: Sequence[Tensor], names: tuple[str, str], **scales: Tensor
) -> None:
    """Two lists of tensors [b, out, in], alike at each place, and scales [b]."""
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{names[0]} and {names[1]} must be lists of one length, at least 1, and hold {len(a)}"
            f" and {len(b)} tensors."
        )
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        own, other = (f"{name}[{index}]" for name in names)
        check_floats(**{own: x, other: y}, **scales)
        if x.dim() != 3 or x.shape != y.shape or len(x) != len(a[0]):
            raise ValueError(
                f"{own} and {other} must be [b, out, in], alike and b that of the first, and their"
                f" shapes are {list(x.shape)} and {list(y.shape)}."
            )
    for name, scale in scales.items():
        check_shape(name, scale, a[0].shape[:1])


def clip_factor(gradient_norm: Tensor, clip: float) -> Tensor:
    """min(1, clip/‖g‖), and 1 where clip is 0 or the gradient vanishes: [b] → [b].

    Raises ValueError for a negative clip.
    """
    if clip < 0:
        raise ValueError(f"clip must be a largest norm, or 0 for none, and is {clip}.")
    if clip == 0.0:
        return torch.ones_like(gradient_norm)
    return torch.where(gradient_norm < clip, 1.0, clip / gradient_norm.clamp_min(clip))


def sequence_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ of the whole list for each sequence, summed in an order that only shapes decide.

    Shapes: each [b, out, in], those at one place alike → [b]; on CUDA float32, else as the tensors.
    Raises ValueError or TypeError if the tensors do not fit together.
    """
    _check(a, b, ("a", "b"))
    if suits_triton(*a, *b):
        from ttt_kernels.clipped_sgd import triton_clipped_sgd

        return triton_clipped_sgd.sequence_products(a, b)
    return sequence_products_reference(a, b)


def add_scaled_(
    totals: Sequence[Tensor], terms: Sequence[Tensor], scale: Tensor, sign: int = 1
) -> None:
    """total ← total + sign·scale·term in place.

    Shapes: each [b, out, in], those at one place alike; scale [b], on their device. sign is 1 or
    −1. Raises ValueError or TypeError if the arguments do not fit together, RuntimeError for a
    total of which several entries lie at one place in memory.
    """
    _check(totals, terms, ("totals", "terms"), scale=scale)
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, and is {sign}.")
    if suits_triton(*totals, *terms, scale):
        from ttt_kernels.clipped_sgd import triton_clipped_sgd

        triton_clipped_sgd.add_scaled_(totals, terms, scale, sign)
    else:
        add_scaled_reference_(totals, terms, scale, sign)


def scaled_differences(
    a: Sequence[Tensor], scale_a: Tensor, b: Sequence[Tensor], scale_b: Tensor
) -> list[Tensor]:
    """scale_a·a − scale_b·b, new tensors like a.

    Shapes: each [b, out, in], those at one place alike; the scales [b], on their device.
    Raises ValueError or TypeError if the arguments do not fit together.
    """
    _check(a, b, ("a", "b"), scale_a=scale_a, scale_b=scale_b)
    if suits_triton(*a, *b, scale_a, scale_b):
        from ttt_kernels.clipped_sgd import triton_clipped_sgd

        return triton_clipped_sgd.scaled_differences(a, scale_a, b, scale_b)
    return scaled_differences_reference(a, scale_a, b, scale_b)
