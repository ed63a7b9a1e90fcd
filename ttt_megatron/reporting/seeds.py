"""Means of several seeds' evaluations over the same documents, and differences between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ttt_megatron.evaluation.statistics import BucketSums, Mean, ratio_mean
from ttt_megatron.sweeps.results import seed_mean

LEGEND = (
    "± standard error over documents, where there are several seeds over seeds; differences are "
    "paired by document, and by seed where both have the same."
)


@dataclass(frozen=True, kw_only=True)
class SeedCurve:
    """One way of reading of a group: sums [documents, columns] by seed, the same documents'."""

    seeds: Mapping[int, BucketSums]

    @property
    def first(self) -> BucketSums:
        """The first seed's."""
        return next(iter(self.seeds.values()))

    def mean(self, column: int | None) -> Mean:
        """Nats a token in a column, or in all."""
        return _over_seeds([_ratio(one.nll, one.counts, column) for one in self.seeds.values()])

    def difference(self, other: "SeedCurve", column: int | None) -> Mean:
        """Nats a token more than another's over the same documents.

        Of single seeds the standard error is that of the documents' differences; of the same
        several seeds, that of the seeds' differences; of others, both groups' are independent.
        """
        if len(self.seeds) == len(other.seeds) == 1:
            return _ratio(self.first.nll - other.first.nll, self.first.counts, column)
        if self.seeds.keys() == other.seeds.keys():
            pairs = [(one, other.seeds[seed]) for seed, one in self.seeds.items()]
            return _over_seeds([_ratio(a.nll - b.nll, a.counts, column) for a, b in pairs])
        own, others = self.mean(column), other.mean(column)
        several = [
            mean.standard_error
            for mean, curve in ((own, self), (others, other))
            if len(curve.seeds) > 1
        ]
        error = math.sqrt(sum(x * x for x in several))
        return Mean(own.mean - others.mean, error, own.documents, own.tokens)


def _ratio(nll: np.ndarray, counts: np.ndarray, column: int | None) -> Mean:
    if column is None:
        return ratio_mean(nll.sum(axis=1), counts.sum(axis=1))
    return ratio_mean(nll[:, column], counts[:, column])


def _over_seeds(means: Sequence[Mean]) -> Mean:
    if len(means) == 1:
        return means[0]
    mean = seed_mean([one.mean for one in means])
    return Mean(mean.mean, mean.standard_error, means[0].documents, means[0].tokens)
