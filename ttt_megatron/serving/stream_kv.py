"""Keys and values of a stream's last tokens: what the next tokens can still see."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_megatron.model.attention import KV


class StreamKV:
    """The `window − 1` entries before a stretch of tokens, and the stretch's own, for some blocks.

    Tokens are numbered within the stretch, which `close` ends. Entries stay as first written.
    Tensors are never changed in place, so copies may share them.
    """

    def __init__(self, num_blocks: int, window: int | None) -> None:
        self.num_blocks = num_blocks
        self._reach = None if window is None else window - 1
        self._entries: list[KV] = []
        self._before = 0

    @property
    def _length(self) -> int:
        return self._entries[0].k.shape[1] if self._entries else 0

    def _first(self, stop: int) -> int:
        """The first entry that a token just after entry `stop` − 1 can see."""
        return 0 if self._reach is None else max(0, stop - self._reach)

    def past(self, start: int) -> list[KV | None]:
        """For each block, what token `start` can see of those before it."""
        stop = self._before + start
        first = self._first(stop)
        if first == stop:
            return [None] * self.num_blocks
        return [KV(kv.k[:, first:stop], kv.v[:, first:stop]) for kv in self._entries]

    def write(self, start: int, own: Sequence[KV]) -> None:
        """Append the entries of the tokens from `start` on that are not there yet."""
        skip = self._length - self._before - start
        if not own or skip >= own[0].k.shape[1]:
            return
        new = [KV(*(x[:, skip:].detach() for x in kv)) for kv in own]
        if self._entries:
            new = [
                KV(torch.cat((old.k, kv.k), dim=1), torch.cat((old.v, kv.v), dim=1))
                for old, kv in zip(self._entries, new, strict=True)
            ]
        self._entries = new

    def close(self) -> None:
        """End the stretch: forget what no later token can see."""
        length = self._length
        first = self._first(length)
        if first:
            # Copies, as a slice would keep the whole tensor alive.
            self._entries = [KV(*(x[:, first:].clone() for x in kv)) for kv in self._entries]
        self._before = length - first

    @property
    def entries(self) -> list[KV]:
        """All that is held of every block; nothing before the first write."""
        return list(self._entries)

    def restore(self, entries: Sequence[KV], own: int) -> None:
        """Hold these instead, one pair a block, the last `own` entries being the stretch's."""
        self._entries = list(entries)
        self._before = self._length - own if entries else 0

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows int64 [b]."""
        self._entries = [KV(*(x.index_select(0, rows) for x in kv)) for kv in self._entries]

    def copy(self) -> "StreamKV":
        """An independent copy, sharing the tensors."""
        return copy.copy(self)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for kv in self._entries for x in kv)
