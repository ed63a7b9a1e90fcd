"""What a stream's next tokens need of those before, for blocks of any kind."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ttt_megatron.config.schema import ATTENTION_MIXERS
from ttt_megatron.model.attention import KV
from ttt_megatron.serving.stream_kv import StreamKV


class StreamMemory:
    """Keys and values of attention blocks, each kind with its window; states of other mixers.

    As `StreamKV`, over blocks of the given kinds (model.mixers), for stretches that end when they
    are written.
    """

    def __init__(self, kinds: Sequence[str], window: int | None) -> None:
        self.num_blocks = len(kinds)
        self._kinds = list(kinds)
        windows = {"attention": window, "full": None}
        self._attention = {
            kind: StreamKV(self._kinds.count(kind), windows[kind])
            for kind in ATTENTION_MIXERS
            if kind in kinds
        }
        # Tuples of tensors [b, …], which are replaced and never changed.
        self._states: dict[int, Any] = {}

    def past(self) -> list[Any]:
        """For each block, what it is to be given of the tokens before the next one."""
        found = {kind: iter(kv.past(0)) for kind, kv in self._attention.items()}
        return [
            next(found[kind]) if kind in found else self._states.get(index)
            for index, kind in enumerate(self._kinds)
        ]

    def advance(self, own: Sequence[Any]) -> None:
        """Take in what the blocks returned for tokens that follow; forget what none can see."""
        for kind, kv in self._attention.items():
            kv.write(0, [new for new, its in zip(own, self._kinds, strict=True) if its == kind])
            kv.close()
        for index, (new, kind) in enumerate(zip(own, self._kinds, strict=True)):
            if kind not in self._attention:
                self._states[index] = type(new)(*(x.detach() for x in new))

    @property
    def entries(self) -> list[KV]:
        """Keys and values held, of every block, in models of windowed attention alone."""
        return [kv for stream in self._attention.values() for kv in stream.entries]

    def restore(self, entries: Sequence[KV]) -> None:
        """Hold these instead, one pair a block, in models of windowed attention alone."""
        for stream in self._attention.values():
            stream.restore(entries, 0)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; rows int64 [b]."""
        for stream in self._attention.values():
            stream.select(rows)
        self._states = {
            index: type(state)(*(x.index_select(0, rows) for x in state))
            for index, state in self._states.items()
        }

    def copy(self) -> "StreamMemory":
        """An independent copy, sharing the tensors."""
        twin = copy.copy(self)
        twin._attention = {kind: stream.copy() for kind, stream in self._attention.items()}
        twin._states = dict(self._states)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        states = sum(x.numel() * x.element_size() for s in self._states.values() for x in s)
        return states + sum(stream.nbytes for stream in self._attention.values())
