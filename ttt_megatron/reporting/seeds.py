"""Means of several seeds' evaluations over the same documents, and differences between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ttt_megatron.evaluation.statistics import BucketSums, Mean, ratio_mean
from ttt_megatron.sweeps.results import seed_mean

LEGEND = (
    "± standard error over documents, where there are several seeds over seeds. Differences are "
    "those of the seeds that both have: of several, ± standard error over seeds; of one, over "
    "documents, so that what another seed would change is not in it."
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

        Of the seeds that both have; where they share none, between their means over seeds. The
        standard error is that of the shared seeds' differences, of one or none that of the
        documents'.
        """
        shared = [
            (one, other.seeds[seed]) for seed, one in self.seeds.items() if seed in other.seeds
        ]
        if shared:
            return _over_seeds([_ratio(a.nll - b.nll, a.counts, column) for a, b in shared])
        return _ratio(self._mean_nll - other._mean_nll, self.first.counts, column)

    @property
    def _mean_nll(self) -> np.ndarray:
        """Over seeds: [documents, columns], nats."""
        return np.mean([one.nll for one in self.seeds.values()], axis=0)


def _ratio(nll: np.ndarray, counts: np.ndarray, column: int | None) -> Mean:
    if column is None:
        return ratio_mean(nll.sum(axis=1), counts.sum(axis=1))
    return ratio_mean(nll[:, column], counts[:, column])


def _over_seeds(means: Sequence[Mean]) -> Mean:
    if len(means) == 1:
        return means[0]
    mean = seed_mean([one.mean for one in means])
    return Mean(mean.mean, mean.standard_error, means[0].documents, means[0].tokens)
