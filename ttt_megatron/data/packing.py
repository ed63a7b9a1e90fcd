"""Which tokens row r of an epoch holds, for the two ways to pack documents into rows.

A row is T + 1 tokens: T inputs and, one further on, T targets. A plan is a function of (lengths,
T, seed, epoch) alone; every epoch has the same number of rows.
"""

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from ttt_megatron.data.dataset import TokenDataset
from ttt_megatron.data.shuffle import hash_keys, permutation
from ttt_megatron.errors import UserError

Packing = Literal["concatenate", "spans"]

# Purposes of random numbers, so that they do not repeat one another.
_DOCUMENT_ORDER, _SPAN_OFFSETS, _SPAN_ORDER, _CUT_ORDER = range(4)


class EpochPlan(ABC):
    """One epoch's rows."""

    @abstractmethod
    def start(self, row: int) -> tuple[int, int]:
        """Document and token offset in it where `row` starts."""

    @abstractmethod
    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, first token, count) in order; the counts add up to T + 1."""


class ConcatenatedEpoch(EpochPlan):
    """Documents in a shuffled order, end to end, cut at stride T; the cuts in a shuffled order.

    Cut c holds tokens cT to (c + 1)T inclusive. Without the second shuffle a batch of short rows
    would be neighbouring pieces of one document.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int, epoch: int) -> None:
        """`lengths` [documents], in tokens."""
        self._length = sequence_length
        self._order = permutation(len(lengths), seed, epoch, _DOCUMENT_ORDER)
        self._ends = np.cumsum(lengths[self._order])
        cuts = (int(self._ends[-1]) - 1) // sequence_length
        self._cuts = permutation(cuts, seed, epoch, _CUT_ORDER)

    def start(self, row: int) -> tuple[int, int]:
        """See `EpochPlan.start`."""
        document, offset, _ = self._pieces(int(self._cuts[row]) * self._length, 1)[0]
        return document, offset

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """See `EpochPlan.pieces`."""
        return self._pieces(int(self._cuts[row]) * self._length, self._length + 1)

    def _pieces(self, position: int, count: int) -> list[tuple[int, int, int]]:
        found = []
        place = int(np.searchsorted(self._ends, position, side="right"))
        while count:
            begin = int(self._ends[place - 1]) if place else 0
            taken = min(count, int(self._ends[place]) - position)
            found.append((int(self._order[place]), position - begin, taken))
            position += taken
            count -= taken
            place += 1
        return found


class SpanEpoch(EpochPlan):
    """Rows within one document, from a shuffled offset on, at stride T; shuffled over all."""

    def __init__(self, lengths: np.ndarray, sequence_length: int, seed: int, epoch: int) -> None:
        """`lengths` [documents], in tokens; those below T + 1 give no row."""
        self._length = sequence_length
        self._documents = np.flatnonzero(lengths > sequence_length)
        counts = span_counts(lengths[self._documents], sequence_length)
        slack = lengths[self._documents] - 1 - counts * sequence_length
        keys = hash_keys(len(lengths), seed, epoch, _SPAN_OFFSETS)[self._documents]
        self._offsets = (keys % (slack + 1).astype(np.uint64)).astype(np.int64)
        self._ends = np.cumsum(counts)
        self._order = permutation(int(self._ends[-1]), seed, epoch, _SPAN_ORDER)

    def start(self, row: int) -> tuple[int, int]:
        """See `EpochPlan.start`."""
        span = int(self._order[row])
        place = int(np.searchsorted(self._ends, span, side="right"))
        within = span - (int(self._ends[place - 1]) if place else 0)
        return int(self._documents[place]), int(self._offsets[place]) + within * self._length

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """See `EpochPlan.pieces`."""
        return [(*self.start(row), self._length + 1)]


def span_counts(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """Rows that lie within each document: floor((length − 1) / T)."""
    return (lengths - 1) // sequence_length


def rows_per_epoch(dataset: TokenDataset, sequence_length: int, packing: Packing) -> int:
    """Rows an epoch of `dataset` gives.

    Raises UserError if there is none.
    """
    needed = sequence_length + 1
    where = f"the {dataset.split} split of {dataset.path}"
    if packing == "concatenate":
        rows = (dataset.num_tokens - 1) // sequence_length
        if rows == 0:
            raise UserError(
                f"{where} has {dataset.num_tokens} tokens, a row of "
                f"data.sequence_length={sequence_length} needs {needed}: prepare more text or "
                "choose a shorter sequence"
            )
    else:
        rows = int(span_counts(dataset.lengths, sequence_length).sum())
        if rows == 0:
            raise UserError(
                f"the longest document in {where} has {dataset.lengths.max()} tokens, a row of "
                f"data.sequence_length={sequence_length} with data.packing=spans needs {needed}: "
                "choose a shorter sequence or data.packing=concatenate"
            )
    return rows


def epoch_plan(
    lengths: np.ndarray, sequence_length: int, packing: Packing, seed: int, epoch: int
) -> EpochPlan:
    """The rows of one epoch."""
    kind = ConcatenatedEpoch if packing == "concatenate" else SpanEpoch
    return kind(lengths, sequence_length, seed, epoch)
