"""The suffix blocks' keys and values over whole sequences, or their cotangents."""

from collections.abc import Sequence
from typing import Protocol

import torch

from ttt_megatron.model.attention import KV


class ChunkCache(Protocol):
    """What reading a chunk asks of a store of keys and values, whatever else it forgets."""

    def past(self, start: int) -> list[KV | None]:
        """For each suffix block after the first, what a chunk at `start` can see before it."""

    def write(self, start: int, own: Sequence[KV]) -> None:
        """Store the keys and values of the tokens from `start` on."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class SuffixKV:
    """One pair of buffers [b, before + T, n_kv, d] for each suffix block after the first.

    (The first one's attention belongs to the prefix.) A chunk reads the `window − 1` entries
    before it and writes its own. Token 0 may have `before` others before it: those are at
    positions −before … −1.
    """

    def __init__(self, num_blocks: int, length: int, window: int | None, before: int = 0) -> None:
        self.num_blocks = num_blocks
        self.length = length
        self.window = window
        self.before = before
        self._buffers: list[KV] = []

    def _first(self, start: int) -> int:
        furthest = -self.before
        return furthest if self.window is None else max(furthest, start - self.window + 1)

    def _rows(self, start: int, stop: int) -> slice:
        return slice(self.before + start, self.before + stop)

    def reserve(self, like: Sequence[KV]) -> None:
        """Make the buffers, zero, if there are none yet: as `like` but for the number of tokens."""
        if not self._buffers:
            size = self.before + self.length
            self._buffers = [
                KV(*(x.new_zeros(x.shape[0], size, *x.shape[2:]) for x in kv)) for kv in like
            ]

    def past(self, start: int) -> list[KV | None]:
        """What a chunk that starts at `start` can see of the tokens before it."""
        first = self._first(start)
        if first == start:
            return [None] * self.num_blocks
        rows = self._rows(first, start)
        return [KV(kv.k[:, rows], kv.v[:, rows]) for kv in self._buffers]

    def write(self, start: int, own: Sequence[KV]) -> None:
        """Store keys and values of the tokens from `start` on."""
        self.reserve(own)
        for kv, new in zip(self._buffers, own, strict=True):
            for buffer, value in zip(kv, new, strict=True):
                buffer[:, self._rows(start, start + value.shape[1])] = value.detach()

    def entries(self, start: int, stop: int) -> list[KV]:
        """Views of the entries of tokens start … stop−1; no blocks before `reserve` or a write."""
        rows = self._rows(start, stop)
        return [KV(kv.k[:, rows], kv.v[:, rows]) for kv in self._buffers]

    def add_to_past(self, start: int, past: Sequence[KV | None]) -> None:
        """Add to the entries `past(start)` returned."""
        given = [kv for kv in past if kv is not None]
        self.reserve(given)
        first = self._first(start)
        for kv, addition in zip(self._buffers, given, strict=False):
            for buffer, value in zip(kv, addition, strict=True):
                buffer[:, self._rows(first, start)] += value

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.numel() * buffer.element_size() for kv in self._buffers for buffer in kv)


def gradients(past: Sequence[KV | None]) -> list[KV | None]:
    """The `.grad` of cached keys and values used as leaves."""
    return [
        None if kv is None else KV(*(torch.zeros_like(x) if x.grad is None else x.grad for x in kv))
        for kv in past
    ]
