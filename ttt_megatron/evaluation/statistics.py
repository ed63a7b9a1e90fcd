"""Means over documents, with the standard errors of drawing the documents.

Tokens of one document are not independent, so a document is the unit: a mean is Σs/Σn over
documents' sums s and counts n, and its standard error that of this ratio. For documents of equal
counts it is the usual standard error of the mean of the documents' means.
"""

import math
from dataclasses import dataclass

import numpy as np

from ttt_megatron.evaluation.by_position import PerTokenLosses


@dataclass(frozen=True)
class Mean:
    """A mean over tokens; `standard_error` is nan where fewer than two documents reach."""

    mean: float
    standard_error: float
    documents: int
    tokens: int


@dataclass(frozen=True)
class Bucket:
    """Positions start … stop − 1."""

    start: int
    stop: int


def position_buckets(length: int, first: int = 32) -> list[Bucket]:
    """[0, 32), [32, 64), [64, 128), … until `length` positions are covered; the last one is cut."""
    buckets, start, stop = [], 0, first
    while start < length:
        buckets.append(Bucket(start, min(stop, length)))
        start, stop = stop, stop * 2
    return buckets


@dataclass(frozen=True)
class BucketSums:
    """Sums over counted tokens: nll (float64) and their counts (int64), [documents, buckets]."""

    nll: np.ndarray
    counts: np.ndarray


def sum_buckets(losses: PerTokenLosses, buckets: list[Bucket]) -> BucketSums:
    """Add up every document's losses by bucket."""
    nll = np.zeros((losses.num_documents, len(buckets)))
    counts = np.zeros(nll.shape, dtype=np.int64)
    for row, (values, counted) in enumerate(zip(losses.nll, losses.counted, strict=True)):
        for column, bucket in enumerate(buckets):
            inside = slice(bucket.start, bucket.stop)
            nll[row, column] = values[inside][counted[inside]].sum()
            counts[row, column] = counted[inside].sum()
    return BucketSums(nll, counts)


def ratio_mean(sums: np.ndarray, counts: np.ndarray) -> Mean:
    """Σ sums / Σ counts over documents that have any; both [documents]."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    documents, tokens = len(counts), float(counts.sum())
    if documents == 0:
        return Mean(math.nan, math.nan, 0, 0)
    mean = float(sums.sum()) / tokens
    error = math.nan
    if documents > 1:
        scatter = float(np.square(sums - mean * counts).sum())
        error = math.sqrt(scatter * documents / (documents - 1)) / tokens
    return Mean(mean, error, documents, int(tokens))
