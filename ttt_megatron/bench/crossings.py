"""From which context length on one system is cheaper than another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """How two costs compare over the lengths that both were measured at.

    cheaper: whether the first is below the second at the longest length; at: the length from
    which this holds, None if it does at every one; changes: how often either overtakes the other;
    longest: tokens; ratio: the first's cost over the second's there.
    """

    cheaper: bool
    at: float | None
    changes: int
    longest: int
    ratio: float

    def __str__(self) -> str:
        if self.at is None:
            return "always" if self.cheaper else f"not up to {self.longest:,}"
        text = f"{'from' if self.cheaper else 'only below'} {self.at:,.0f}"
        return text if self.changes == 1 else f"{text} ({self.changes} changes)"


def find_crossing(first: Mapping[int, float], second: Mapping[int, float]) -> Crossing | None:
    """Where the first's cost by length falls below the second's for good, or rises above it.

    Costs are positive, of one unit; lengths in tokens. Between lengths their difference is a
    straight line over the length's logarithm; equal costs are not cheaper. None if no length has
    both.
    """
    lengths = sorted(set(first) & set(second))
    if not lengths:
        return None
    differences = [first[n] - second[n] for n in lengths]
    at, changes = None, 0
    for index in range(1, len(lengths)):
        before, after = differences[index - 1], differences[index]
        if (before < 0) == (after < 0):
            continue
        changes += 1
        share = before / (before - after)
        low, high = math.log(lengths[index - 1]), math.log(lengths[index])
        at = math.exp(low + share * (high - low))
    longest = lengths[-1]
    return Crossing(
        cheaper=differences[-1] < 0,
        at=at,
        changes=changes,
        longest=longest,
        ratio=first[longest] / second[longest],
    )
