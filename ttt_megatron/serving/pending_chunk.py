"""The chunk a stream is in the middle of."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PendingChunk:
    """The part of the current chunk that was read.

    tokens [b, k] int64; entered [b, k, H] the output of `enter_suffix`; start: the absolute
    position of the chunk's first token.
    """

    start: int
    tokens: Tensor
    entered: Tensor

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def extended(self, tokens: Tensor, entered: Tensor) -> "PendingChunk":
        """With more tokens read."""
        return PendingChunk(
            self.start, torch.cat((self.tokens, tokens), 1), torch.cat((self.entered, entered), 1)
        )

    def selected(self, rows: Tensor) -> "PendingChunk":
        """Of these sequences, in this order; rows int64 [b]."""
        tokens, entered = (x.index_select(0, rows) for x in (self.tokens, self.entered))
        return PendingChunk(self.start, tokens, entered)
