"""Needle prompts of an exact length in tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ttt_megatron.data.dataset import TokenDataset
from ttt_megatron.data.tokenizer import Tokenizer
from ttt_megatron.errors import UserError
from ttt_megatron.evaluation import needle_text
from ttt_megatron.evaluation.haystack import EssayHaystacks, Haystack, noise_haystack
from ttt_megatron.evaluation.needle_text import NeedleKind

Place = float | Literal["near", "removed"]
"""Share of the haystack before the needle; or right before the question, or nowhere (controls)."""

NEAR: Literal["near"] = "near"
REMOVED: Literal["removed"] = "removed"


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt:
    """tokens: int64 [length], BOS first; value: what is asked for; start: the needle's first token,
    or None where there is no needle; distractors: other values of the same kind."""

    tokens: np.ndarray
    value: str
    start: int | None
    distractors: list[str]

    @property
    def distance(self) -> int | None:
        """Tokens from the needle's first to the prompt's last, both included."""
        return None if self.start is None else len(self.tokens) - self.start


class PromptBuilder:
    """Makes the same prompts again for the same seed.

    Sample i of a kind and a length has one key, value and haystack, wherever the needle lies.
    """

    def __init__(
        self, tokenizer: Tokenizer, dataset: TokenDataset, *, answers: int, seed: int = 0
    ) -> None:
        """`answers`: values to choose from, the true one included."""
        self._tokenizer = tokenizer
        self._essays = EssayHaystacks(dataset, tokenizer)
        self._answers = answers
        self._seed = seed

    def build(self, kind: NeedleKind, length: int, place: Place, sample: int) -> NeedlePrompt:
        """Raises UserError if `length` has no room for a haystack."""
        generator = random.Random(f"{self._seed} {kind.number} {length} {sample}")
        key = needle_text.draw_key(generator)
        value, *distractors = self._draw_values(kind, generator)
        encode = self._tokenizer.encode_array
        opening = np.concatenate(([self._tokenizer.bos_id], encode(needle_text.introduction(kind))))
        needle = encode(needle_text.statement(kind, key, value))
        closing = encode(needle_text.question(kind, key))
        room = length - len(opening) - len(needle) - len(closing)
        if room < 1:
            raise UserError(
                f"--lengths {length}: introduction, needle and question of {kind.name} alone take "
                f"{length - room} tokens; give more"
            )
        haystack = self._haystack(kind, room + len(needle), generator)
        if place == REMOVED:
            parts = [opening, haystack.tokens[: room + len(needle)], closing]
            return _prompt(parts, value, None, distractors)
        before, behind = haystack.split(room, 1.0 if place == NEAR else float(place))
        start = len(opening) + len(before)
        return _prompt([opening, before, needle, behind, closing], value, start, distractors)

    def _draw_values(self, kind: NeedleKind, generator: random.Random) -> list[str]:
        values: dict[str, None] = {}
        while len(values) < self._answers:
            values[kind.draw_value(generator)] = None
        return list(values)

    def _haystack(self, kind: NeedleKind, count: int, generator: random.Random) -> Haystack:
        if kind.essay:
            return self._essays.draw(count, generator)
        return noise_haystack(self._tokenizer, needle_text.NOISE, count)


def _prompt(
    parts: Sequence[np.ndarray], value: str, start: int | None, distractors: list[str]
) -> NeedlePrompt:
    tokens = np.concatenate(parts).astype(np.int64)
    return NeedlePrompt(tokens=tokens, value=value, start=start, distractors=distractors)
