"""What a model's losses may depend on, and on what they do.

*Causality*: a changed token changes no loss of tokens before it. *Isolation*: documents read in one
batch do not change one another. *Carry-over*: what is read before a document in the same row, as
training's packing does, does change it; by how much is measured, not judged. *Content*: context in
another order, or of another document, makes predictions worse if the model uses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt_megatron.evaluation.by_position import evaluate_by_position
from ttt_megatron.evaluation.statistics import Mean, ratio_mean
from ttt_megatron.meta.learner import Learner

# Equal inputs in equal shapes give equal bits; this much is room for sums in another order.
LIMIT = 1e-12

OnRead = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read: `inner_steps` as in `evaluate_by_position`."""

    learner: Learner
    inner_steps: bool
    bos_id: int
    batch: int = 1
    on_progress: OnRead | None = None

    def losses(self, documents: Sequence[Tensor], batch: int | None = None) -> list[np.ndarray]:
        """Nats, one array [T] a document of T + 1 tokens."""
        read = evaluate_by_position(
            self.learner,
            documents,
            inner_steps=self.inner_steps,
            batch=batch or self.batch,
            bos_id=self.bos_id,
            on_progress=self.on_progress,
        )
        return read.nll

    @torch.no_grad()
    def losses_of(self, inputs: Tensor, targets: Tensor) -> np.ndarray:
        """Nats [n, T] of targets [n, T] that need not be the inputs' next tokens."""
        device = self.learner.model.head_weight.device
        read = []
        for tokens, wanted in zip(inputs.split(self.batch), targets.split(self.batch), strict=True):
            wanted = wanted.to(device)
            output = self.learner(
                tokens.to(device), wanted, wanted != self.bos_id, inner_steps=self.inner_steps
            )
            read.append(output.token_nll.double().cpu().numpy())
            if self.on_progress is not None:
                self.on_progress(len(tokens), tokens.numel())
        return np.concatenate(read)


@dataclass(frozen=True, kw_only=True)
class Causality:
    """A token changed at one position of every document.

    before: the largest change, in nats, of a loss of what comes before the token, and of its own
    where it is changed among the inputs alone; after: the mean change of later losses then, over
    documents, which shows that the token was read at all.
    """

    position: int
    before: float
    after: Mean

    @property
    def holds(self) -> bool:
        """Whether nothing changed before the token."""
        return self.before <= LIMIT


def probe_positions(length: int, chunk_size: int) -> list[int]:
    """Where tokens are changed: within a chunk, at a chunk's first and last token, near the end."""
    boundary = max(length // 2 // chunk_size, 1) * chunk_size
    wanted = {length // 4, boundary - 1, boundary, boundary + 1, length - 2}
    return sorted(position for position in wanted if 2 <= position < length)


def check_causality(
    reading: Reading, documents: Sequence[Tensor], positions: Sequence[int]
) -> list[Causality]:
    """Changes token `position` of every document [T + 1], for each position, one at a time.

    First among the inputs, where it must not change the prediction of itself or of what comes
    before; then among the targets too, which inner steps read, but only those after its chunk.
    """
    right = torch.stack(list(documents))
    losses = reading.losses_of(right[:, :-1], right[:, 1:])
    results = []
    for position in positions:
        wrong = torch.stack([_with_another_token(x, position) for x in documents])
        by_input = np.abs(reading.losses_of(wrong[:, :-1], right[:, 1:]) - losses)
        by_both = np.abs(reading.losses_of(wrong[:, :-1], wrong[:, 1:]) - losses)
        # Entry i predicts token i + 1 from tokens up to i.
        before = max(by_input[:, :position].max(), by_both[:, : position - 1].max())
        after = ratio_mean(*_sums(list(by_input[:, position:])))
        results.append(Causality(position=position, before=float(before), after=after))
    return results


def _with_another_token(document: Tensor, position: int) -> Tensor:
    """The token replaced by another of the same document, so that it is no BOS and no stranger."""
    changed = document.clone()
    others = document[1:][document[1:] != document[position]]
    changed[position] = others[0] if len(others) else document[position] - 1
    return changed


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """Documents read alone, beside others, and behind another in the same row.

    beside: the largest change of a loss, in nats, by the other rows of a batch; behind: loss behind
    another document minus loss alone, over each document's first `tokens` tokens.
    """

    beside: float
    behind: Mean
    tokens: int


def check_isolation(reading: Reading, documents: Sequence[Tensor], tokens: int) -> Isolation:
    """Compares the first `tokens` losses of documents; there must be two documents or more."""
    cut = [document[: tokens + 1] for document in documents]
    alone = reading.losses(cut, batch=1)
    together = reading.losses(cut, batch=max(2, reading.batch))
    beside = max(float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True))
    rows = [
        torch.cat((other, document))
        for other, document in zip([*cut[1:], cut[0]], cut, strict=True)
    ]
    # The BOS between the two is predicted from the first one's last token, and counts nowhere.
    after = [nll[-tokens:] for nll in reading.losses(rows)]
    gaps = [b - a[:tokens] for a, b in zip(alone, after, strict=True)]
    return Isolation(beside=beside, behind=ratio_mean(*_sums(gaps)), tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class ContentUse:
    """Losses of the last tokens when what lies far enough before them is not what it was.

    kept: tokens before the measured ones that stay as they are; changed: tokens before those;
    right: nats a token with nothing changed; shuffled, foreign: how much more with the changed
    part's chunks in another order, or taken from another document.
    """

    kept: int
    changed: int
    right: Mean
    shuffled: Mean
    foreign: Mean


def check_content(
    reading: Reading,
    documents: Sequence[Tensor],
    *,
    last: int,
    kept: int,
    chunk_size: int,
    seed: int = 0,
) -> ContentUse:
    """Documents [T + 1] of one length; the part that changes is tokens 1 … T − last − kept.

    There must be two documents or more, and two chunks or more to shuffle.
    """
    stop = len(documents[0]) - last - kept
    generator = torch.Generator().manual_seed(seed)
    shuffled = [_shuffled(x, stop, chunk_size, generator) for x in documents]
    donors = [*documents[1:], documents[0]]
    foreign = [
        torch.cat((donor[:stop], x[stop:])) for x, donor in zip(documents, donors, strict=True)
    ]
    right, *others = (
        [nll[-last:] for nll in reading.losses(read)] for read in (documents, shuffled, foreign)
    )
    gaps = [
        ratio_mean(*_sums([b - a for a, b in zip(right, other, strict=True)])) for other in others
    ]
    return ContentUse(
        kept=kept,
        changed=stop - 1,
        right=ratio_mean(*_sums(right)),
        shuffled=gaps[0],
        foreign=gaps[1],
    )


def _shuffled(document: Tensor, stop: int, chunk_size: int, generator: torch.Generator) -> Tensor:
    """Tokens 1 … stop − 1 in chunks of another order; the rest, and BOS, stay."""
    chunks = list(document[1:stop].split(chunk_size))
    order = torch.randperm(len(chunks), generator=generator).tolist()
    if order == sorted(order):
        order = order[::-1]
    return torch.cat((document[:1], *(chunks[number] for number in order), document[stop:]))


def _sums(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts, one a document, as `ratio_mean` takes them."""
    return np.array([x.sum() for x in values]), np.array([len(x) for x in values])
