"""Text that a needle is hidden in, as tokens, with the places between two sentences."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ttt_megatron.data.dataset import TokenDataset
from ttt_megatron.data.tokenizer import Tokenizer
from ttt_megatron.errors import UserError

_ENDS = (".", "!", "?", "\n")


@dataclass(frozen=True)
class Haystack:
    """tokens: int64 [n]; ends: bool [n], where a sentence ends behind the token."""

    tokens: np.ndarray
    ends: np.ndarray

    def split(self, count: int, depth: float) -> tuple[np.ndarray, np.ndarray]:
        """The first `count` tokens in two, cut between sentences nearest to the share `depth`.

        Depth 0 is before all of them and 1 behind. Without a sentence's end the cut is exact.
        """
        tokens = self.tokens[:count]
        places = np.flatnonzero(self.ends[:count]) + 1
        if depth <= 0 or depth >= 1:
            place = 0 if depth <= 0 else count
        elif len(places):
            place = int(places[np.abs(places - depth * count).argmin()])
        else:
            place = round(depth * count)
        return tokens[:place], tokens[place:]


def noise_haystack(tokenizer: Tokenizer, sentences: Sequence[str], count: int) -> Haystack:
    """The sentences, a space before each, over and over: `count` tokens or more."""
    pieces = [tokenizer.encode_array(f" {sentence}") for sentence in sentences]
    once = np.concatenate(pieces)
    ends = np.zeros(len(once), dtype=bool)
    ends[np.cumsum([len(piece) for piece in pieces]) - 1] = True
    times = -(-count // len(once))
    return Haystack(np.tile(once, times), np.tile(ends, times))


class EssayHaystacks:
    """Running text: held-out documents, tokens as they were prepared."""

    def __init__(self, dataset: TokenDataset, tokenizer: Tokenizer) -> None:
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def draw(self, count: int, generator: random.Random) -> Haystack:
        """`count` tokens: a part of one document, or of as many, end to end, as it takes.

        Raises UserError if all documents together have fewer.
        """
        dataset = self._dataset
        if self._available < count:
            raise UserError(
                f"a haystack of {count:,} tokens: the {dataset.split} split of {dataset.path} has "
                f"{self._available:,} in all; give shorter --lengths, or --data with more text"
            )
        number, parts, missing = generator.randrange(dataset.num_documents), [], count
        while missing:
            # The BOS of each document stays out: a haystack is one text.
            held = int(dataset.lengths[number]) - 1
            start = generator.randrange(held - missing + 1) if held > missing else 0
            taken = min(held, missing)
            parts.append(dataset.read(number, 1 + start, taken))
            missing -= taken
            number = (number + 1) % dataset.num_documents
        tokens = np.concatenate(parts)
        return Haystack(tokens, np.array([self._ends_sentence(int(x)) for x in tokens]))

    @cached_property
    def _available(self) -> int:
        return int(self._dataset.lengths.sum()) - self._dataset.num_documents

    def _ends_sentence(self, token: int) -> bool:
        if token not in self._known:
            text = self._tokenizer.decode([token])
            self._known[token] = text.rstrip(" ").endswith(_ENDS)
        return self._known[token]
