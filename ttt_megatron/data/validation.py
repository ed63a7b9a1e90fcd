"""Held-out documents as evaluation reads them: one row a document, from its start."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from ttt_megatron.data.dataset import TokenDataset
from ttt_megatron.data.shuffle import permutation
from ttt_megatron.data.stream import Batch
from ttt_megatron.errors import UserError


@dataclass(frozen=True)
class ValidationSequence:
    """The start of one document.

    Attributes:
        document: number in the dataset.
        name: its name, for reports.
        tokens: int64 [length + 1], BOS first; the inputs are all but the last, the targets all
            but the first.
    """

    document: int
    name: str
    tokens: torch.Tensor


class ValidationSequences(Sequence[ValidationSequence]):
    """A fixed choice of documents, read when asked for.

    Attributes:
        documents: their numbers, int64 [n], in the order of the sequence.
        length: tokens a row less one, or None for whole documents.
    """

    def __init__(self, dataset: TokenDataset, documents: np.ndarray, length: int | None) -> None:
        """`validation_sequences` chooses and calls this."""
        self.dataset = dataset
        self.documents = documents
        self.length = length

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> ValidationSequence: ...
    @overload
    def __getitem__(self, index: slice) -> "ValidationSequences": ...
    def __getitem__(self, index: int | slice) -> "ValidationSequence | ValidationSequences":
        if isinstance(index, slice):
            return ValidationSequences(self.dataset, self.documents[index], self.length)
        document = int(self.documents[index])
        tokens = torch.from_numpy(self._tokens(document))
        return ValidationSequence(document, self.dataset.names[document], tokens)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count` − 1 (fewer at the end) as one batch.

        `Batch.rows` are positions in this sequence. Needs a length, or documents of equal length.
        """
        rows = range(first, min(first + count, len(self)))
        documents = [int(self.documents[row]) for row in rows]
        sequences = [self._tokens(document) for document in documents]
        starts = [(document, 0) for document in documents]
        return Batch.from_rows(sequences, self.dataset.bos_id, rows, starts)

    def _tokens(self, document: int) -> np.ndarray:
        count = self.dataset.lengths[document] if self.length is None else self.length + 1
        return self.dataset.read(document, 0, int(count))


def validation_sequences(
    dataset: TokenDataset, length: int | None, count: int | None = None, seed: int = 0
) -> ValidationSequences:
    """Chooses up to `count` documents (None: all) of at least `length` + 1 tokens.

    The order is shuffled by `seed`; a larger count extends a smaller one's choice. With `length`
    None documents are taken whole.

    Raises UserError if no document is long enough.
    """
    order = permutation(dataset.num_documents, seed)
    chosen = order[dataset.lengths[order] > (1 if length is None else length)][:count]
    if not len(chosen):
        raise UserError(
            f"no document in the {dataset.split} split of {dataset.path} has {(length or 1) + 1} "
            f"tokens (the longest has {dataset.lengths.max()}): evaluate at a shorter length"
        )
    return ValidationSequences(dataset, chosen, length)
