"""Sums and steps over a list of fast weights, per sequence: the definitions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _rows(per_sequence: Tensor) -> Tensor:
    return per_sequence.view(-1, 1, 1)


def sequence_products_reference(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """⟨a, b⟩ of the whole list for each sequence. Shapes: each [b, out, in] → [b]."""
    own = [torch.linalg.vecdot(x.flatten(1), y.flatten(1)) for x, y in zip(a, b, strict=True)]
    return torch.stack(own).sum(0)


def add_scaled_reference_(
    totals: Sequence[Tensor], terms: Sequence[Tensor], scale: Tensor, sign: int = 1
) -> None:
    """total ← total ± scale·term in place. Shapes: each [b, out, in], scale [b]."""
    for total, term in zip(totals, terms, strict=True):
        total.addcmul_(term, _rows(scale), value=sign)


def scaled_differences_reference(
    a: Sequence[Tensor], scale_a: Tensor, b: Sequence[Tensor], scale_b: Tensor
) -> list[Tensor]:
    """scale_a·a − scale_b·b. Shapes: each [b, out, in], the scales [b]; results as a."""
    return [
        torch.addcmul(x * _rows(scale_a), y, _rows(scale_b), value=-1)
        for x, y in zip(a, b, strict=True)
    ]
