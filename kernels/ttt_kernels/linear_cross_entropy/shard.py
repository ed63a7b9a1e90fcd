"""A part of the vocabulary, and how parts are put together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class VocabularyShard:
    """Rows first … of the output head are this process's; reductions run over all parts.

    `largest` is the number of rows of the largest part (None: this one's): processes cut the
    tokens by it, so that their reductions meet. reduce_max and reduce_sum take a tensor and return
    its reduction over the processes, in place or not; the defaults are a whole vocabulary's.
    """

    first: int = 0
    largest: int | None = None
    reduce_max: Callable[[Tensor], Tensor] = _alone
    reduce_sum: Callable[[Tensor], Tensor] = _alone

    def locate(self, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Targets [t] as (row [t, 1] of this shard, 1 or 0 [t, 1] for whether it has them)."""
        row = (targets - self.first).unsqueeze(-1)
        inside = (row >= 0) & (row < rows)
        return torch.where(inside, row, 0), inside


WHOLE = VocabularyShard()
