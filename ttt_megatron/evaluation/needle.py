"""Needles in haystacks: prompts of every kind, length and place, and what a model scores."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ttt_megatron.errors import UserError
from ttt_megatron.evaluation.attention_reach import AttentionReach
from ttt_megatron.evaluation.needle_prompt import (
    NEAR,
    REMOVED,
    NeedlePrompt,
    Place,
    PromptBuilder,
)
from ttt_megatron.evaluation.needle_scores import Answerer, in_batches
from ttt_megatron.evaluation.needle_text import KINDS
from ttt_megatron.evaluation.statistics import Mean, ratio_mean

Score = Literal["exact", "choice"]


@dataclass(frozen=True, kw_only=True)
class NeedleSettings:
    """What is measured. Raises UserError for what makes no sense.

    kinds: of S-NIAH; lengths: of prompts, in tokens; depths: shares of the haystack before the
    needle; samples: prompts of each kind, length and place; score: whether the value must be
    generated (`exact`, within `answer_tokens` tokens) or be the likeliest of `answers` (`choice`).
    """

    kinds: tuple[int, ...] = (1, 2, 3)
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10
    score: Score = "exact"
    answers: int = 10
    answer_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "needles": (set(self.kinds) <= set(KINDS), f"{sorted(KINDS)}"),
            "lengths": (all(length > 0 for length in self.lengths), "numbers of tokens"),
            "depths": (all(0 <= depth <= 1 for depth in self.depths), "percentages from 0 to 100"),
            "samples": (self.samples >= 1, "1 or more"),
            "answers": (2 <= self.answers <= 1000, "from 2 to 1000"),
            "answer-tokens": (self.answer_tokens >= 1, "1 or more"),
        }
        values = {
            "needles": list(self.kinds),
            "lengths": list(self.lengths),
            "depths": [100 * depth for depth in self.depths],
            "samples": self.samples,
            "answers": self.answers,
            "answer-tokens": self.answer_tokens,
        }
        for name, (fine, allowed) in wrong.items():
            if not fine:
                raise UserError(f"--{name} {values[name]}: give {allowed}")

    @property
    def places(self) -> list[Place]:
        """All depths, then the two controls."""
        return [*self.depths, NEAR, REMOVED]

    @property
    def read_places(self) -> list[Place]:
        """The same without the control `near` where a depth of 1 has its prompts."""
        return [place for place in self.places if place != NEAR or 1.0 not in self.depths]

    @property
    def prompts(self) -> int:
        """How many a model reads."""
        return len(self.kinds) * len(self.lengths) * len(self.read_places) * self.samples


@dataclass(frozen=True, kw_only=True)
class NeedleCell:
    """Prompts of one kind, length and place: their scores, and how far back the needle begins.

    Both are in the order of the samples; distances are empty where there is no needle.
    """

    kind: int
    length: int
    place: Place
    scores: tuple[float, ...]
    distances: tuple[int, ...]

    @property
    def mean(self) -> Mean:
        """The score, with its standard error over prompts."""
        return mean_score(self.scores)

    def inside(self, reach: AttentionReach) -> float:
        """Share of needles that lie inside the window, whole, when the question has been read."""
        seen = [reach.sees(distance) for distance in self.distances]
        return float(np.mean(seen)) if seen else 0.0


def measure_needles(
    answerer: Answerer,
    builder: PromptBuilder,
    settings: NeedleSettings,
    *,
    batch: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[NeedleCell]:
    """Scores of all cells. `on_progress` is called after each batch with its prompts and tokens."""

    def score(prompts: Sequence[NeedlePrompt]) -> list[float]:
        if settings.score == "choice":
            return answerer.choice(prompts)
        return answerer.exact(prompts, settings.answer_tokens)

    cells = [
        NeedleCell(
            kind=kind,
            length=length,
            place=place,
            scores=tuple(in_batches(prompts, batch, score, on_progress)),
            distances=tuple(x.distance for x in prompts if x.distance is not None),
        )
        for kind, length, place, prompts in _all_prompts(builder, settings)
    ]
    deepest = [cell for cell in cells if cell.place == 1.0]
    return cells + [replace(cell, place=NEAR) for cell in deepest]


def _all_prompts(
    builder: PromptBuilder, settings: NeedleSettings
) -> Iterator[tuple[int, int, Place, list[NeedlePrompt]]]:
    for kind in settings.kinds:
        for length in settings.lengths:
            for place in settings.read_places:
                samples = range(settings.samples)
                prompts = [builder.build(KINDS[kind], length, place, n) for n in samples]
                yield kind, length, place, prompts


@dataclass(frozen=True, kw_only=True)
class ScoreByReach:
    """Scores of one kind's needles by where they lie when the question has been read.

    inside: within one attention window; outside: beyond it; beyond: the part of those that windows
    upon windows cannot reach either; share_inside: of all needles. Controls are left out.
    """

    inside: Mean
    outside: Mean
    beyond: Mean
    share_inside: float


def score_by_reach(cells: Iterable[NeedleCell], reach: AttentionReach) -> ScoreByReach:
    """Of all depths and lengths in `cells`.

    A sample's prompts have one key, value and haystack at every depth, so standard errors are over
    samples: a mean's `documents` are samples of each kind and length, its `tokens` prompts.
    """
    scored = [
        ((cell.kind, cell.length, sample), score, distance)
        for cell in cells
        if not isinstance(cell.place, str)
        for sample, (score, distance) in enumerate(zip(cell.scores, cell.distances, strict=True))
    ]
    inside = [(sample, score) for sample, score, distance in scored if reach.sees(distance)]
    outside = [(sample, score) for sample, score, distance in scored if not reach.sees(distance)]
    beyond = [(s, score) for s, score, distance in scored if not reach.could_pass_on(distance)]
    return ScoreByReach(
        inside=_mean_over_samples(inside),
        outside=_mean_over_samples(outside),
        beyond=_mean_over_samples(beyond),
        share_inside=len(inside) / len(scored) if scored else 0.0,
    )


def _mean_over_samples(scored: Iterable[tuple[Hashable, float]]) -> Mean:
    """Of (sample, score) pairs, the scores of one sample being no independent draws."""
    sums: dict[Hashable, float] = defaultdict(float)
    counts: Counter[Hashable] = Counter()
    for sample, score in scored:
        sums[sample] += score
        counts[sample] += 1
    return ratio_mean(np.array([*sums.values()]), np.array([*counts.values()], dtype=np.int64))


def mean_score(scores: Sequence[float]) -> Mean:
    """The mean of scores of single prompts, each of a sample of its own."""
    return ratio_mean(np.asarray(scores, dtype=float), np.ones(len(scores)))
