"""Buckets, means and standard errors against direct computations."""

import math

import numpy as np
import pytest

from ttt_megatron.evaluation.by_position import PerTokenLosses
from ttt_megatron.evaluation.statistics import position_buckets, ratio_mean, sum_buckets


def test_buckets_double_and_the_last_one_is_cut():
    buckets = [(b.start, b.stop) for b in position_buckets(300)]
    assert buckets == [(0, 32), (32, 64), (64, 128), (128, 256), (256, 300)]
    assert [(b.start, b.stop) for b in position_buckets(32)] == [(0, 32)]
    assert [(b.start, b.stop) for b in position_buckets(7)] == [(0, 7)]
    assert [(b.start, b.stop) for b in position_buckets(33)] == [(0, 32), (32, 33)]


def test_sums_leave_out_what_does_not_count():
    nll = [np.arange(40.0), np.arange(10.0)]
    counted = [np.arange(40) % 2 == 0, np.ones(10, dtype=bool)]
    sums = sum_buckets(PerTokenLosses(nll, counted), position_buckets(40))
    assert sums.counts.tolist() == [[16, 4], [10, 0]]
    assert sums.nll.tolist() == [[sum(range(0, 32, 2)), sum(range(32, 40, 2))], [45, 0]]


def test_equal_counts_give_the_usual_standard_error():
    sums = np.array([3.0, 5.0, 10.0, 4.0])
    mean = ratio_mean(sums, np.full(4, 2))
    assert mean.mean == pytest.approx((sums / 2).mean())
    assert mean.standard_error == pytest.approx((sums / 2).std(ddof=1) / math.sqrt(4))
    assert (mean.documents, mean.tokens) == (4, 8)


def test_the_standard_error_is_the_spread_of_the_mean_over_drawn_documents():
    generator = np.random.default_rng(0)

    def draw(documents):
        counts = generator.integers(5, 50, documents)
        return generator.normal(3.0 + counts / 40, 0.5) * counts, counts

    means = [ratio_mean(*draw(60)) for _ in range(2000)]
    spread = np.std([mean.mean for mean in means])
    assert np.mean([mean.standard_error for mean in means]) == pytest.approx(spread, rel=0.05)


def test_few_documents_have_no_standard_error():
    one = ratio_mean(np.array([4.0, 0.0]), np.array([2, 0]))
    assert (one.mean, one.documents) == (2.0, 1)
    assert math.isnan(one.standard_error)
    none = ratio_mean(np.zeros(2), np.zeros(2))
    assert math.isnan(none.mean)
    assert none.documents == 0
