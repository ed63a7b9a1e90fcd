"""Per-token losses of documents, read from their starts."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.errors import UserError
from ttt_megatron.meta.learner import Learner

# Documents are sorted by length within this many batches, so that little is padded.
_SORTED_BATCHES = 16


@dataclass(frozen=True)
class PerTokenLosses:
    """Negative log-likelihoods in nats, one array a document, in the documents' order.

    nll: float64 [T], entry t being the loss of predicting token t + 1 from tokens 0 … t;
    counted: bool [T], False where the predicted token is BOS and so counts nowhere.
    """

    nll: list[np.ndarray]
    counted: list[np.ndarray]

    @property
    def num_documents(self) -> int:
        """Documents read."""
        return len(self.nll)

    @property
    def longest(self) -> int:
        """Positions of the longest document."""
        return max(len(x) for x in self.nll)


def evaluate_by_position(
    learner: Learner,
    documents: Iterable[Tensor],
    length: int | None = None,
    inner_steps: bool | None = None,
    batch: int = 1,
    *,
    bos_id: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerTokenLosses:
    """Losses of every token of `documents`, 1-D int64 tensors of at least 2 tokens.

    Only the first `length` + 1 tokens are read (None: all). inner_steps None takes the mode's.
    Every document starts afresh; `batch` are read at once, the shorter ones padded at their end,
    which changes nothing before it. Predicting `bos_id` counts neither in inner steps nor here.
    `on_progress` is called after each batch with the documents and positions it held.

    Raises UserError if a document has fewer than 2 tokens, or there is none.
    """
    if batch < 1:
        raise UserError(f"batch of {batch} documents: read at least 1 at once")
    cut = (document[: None if length is None else length + 1] for document in documents)
    results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for numbers, rows in _batches(cut, batch):
        losses = _read_rows(learner, rows, inner_steps, bos_id)
        results.update(zip(numbers, losses, strict=True))
        if on_progress is not None:
            on_progress(len(rows), sum(len(row) - 1 for row in rows))
    if not results:
        raise UserError("there are no documents to evaluate on: prepare data with a held-out part")
    ordered = [results[number] for number in range(len(results))]
    return PerTokenLosses([nll for nll, _ in ordered], [counted for _, counted in ordered])


def _batches(
    documents: Iterable[Tensor], batch: int
) -> Iterator[tuple[Sequence[int], Sequence[Tensor]]]:
    """Batches of documents of similar lengths, with their numbers."""
    numbered = enumerate(documents)
    while stretch := list(itertools.islice(numbered, batch * _SORTED_BATCHES)):
        for number, document in stretch:
            if document.dim() != 1 or len(document) < 2:
                raise UserError(
                    f"document {number} has the shape {tuple(document.shape)}: it takes 2 tokens "
                    "or more in one dimension to measure a loss"
                )
        stretch.sort(key=lambda entry: len(entry[1]))
        for first in range(0, len(stretch), batch):
            numbers, rows = zip(*stretch[first : first + batch], strict=True)
            yield numbers, rows


@torch.no_grad()
def _read_rows(
    learner: Learner, rows: Sequence[Tensor], inner_steps: bool | None, bos_id: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    device = learner.model.head_weight.device
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    targets = padded[:, 1:]
    lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
    mask = torch.arange(targets.shape[1], device=device) < lengths.unsqueeze(1)
    if bos_id is not None:
        mask &= targets != bos_id
    output = learner(padded[:, :-1], targets, mask, inner_steps=inner_steps)
    nll, kept = output.token_nll.double().cpu().numpy(), mask.cpu().numpy()
    return [
        (nll[row, :count].copy(), kept[row, :count].copy())
        for row, count in enumerate(lengths.tolist())
    ]
