"""Crossing points of made-up costs, whose answers are known."""

import math

import pytest

from ttt_megatron.bench.crossings import find_crossing

FLAT = {256: 4.0, 1024: 4.0, 4096: 4.0}


def test_a_cost_that_grows_with_the_logarithm_is_met_where_it_is():
    """1 at 256, 3 at 1,024, 5 at 4,096, so 4 half way from 1,024 to 4,096 in the exponent."""
    growing = {256: 1.0, 1024: 3.0, 4096: 5.0}
    found = find_crossing(FLAT, growing)
    assert found is not None
    assert (found.cheaper, found.changes, found.longest) == (True, 1, 4096)
    assert found.at == pytest.approx(2048)
    assert found.ratio == pytest.approx(0.8)
    assert str(found) == "from 2,048"
    back = find_crossing(growing, FLAT)
    assert back is not None
    assert back.at == pytest.approx(2048)
    assert str(back) == "only below 2,048"


def test_shares_of_a_step_are_those_of_its_exponent():
    """Differences +1 and -3 meet a quarter of the way."""
    found = find_crossing({100: 2.0, 1600: 1.0}, {100: 1.0, 1600: 4.0})
    assert found is not None
    assert found.at == pytest.approx(100 * 16**0.25)


def test_what_never_crosses_is_said():
    assert str(find_crossing(FLAT, dict.fromkeys(FLAT, 3.0))) == "not up to 4,096"
    assert str(find_crossing(FLAT, dict.fromkeys(FLAT, 5.0))) == "always"
    assert str(find_crossing(FLAT, FLAT)) == "not up to 4,096"


def test_equal_costs_at_a_length_are_where_lines_cross():
    found = find_crossing(FLAT, {256: 3.0, 1024: 4.0, 4096: 5.0})
    assert found is not None
    assert (found.changes, found.at) == (1, pytest.approx(1024))


def test_the_last_of_several_crossings_counts_and_they_are_told_of():
    found = find_crossing(FLAT, {256: 5.0, 1024: 3.0, 4096: 5.0})
    assert found is not None
    assert (found.cheaper, found.changes) == (True, 2)
    assert found.at == pytest.approx(2048)
    assert str(found) == "from 2,048 (2 changes)"


def test_lengths_that_only_one_has_are_left_out():
    found = find_crossing(FLAT, {128: 9.0, 1024: 5.0})
    assert found is not None
    assert (found.longest, found.at, found.cheaper) == (1024, None, True)
    assert find_crossing(FLAT, {128: 9.0}) is None
    assert find_crossing({}, FLAT) is None


def test_costs_of_any_unit_cross_at_one_place():
    costs = {n: math.log(n) for n in FLAT}
    flat = dict.fromkeys(FLAT, 7.0)
    seconds, hours = (
        find_crossing({n: c * unit for n, c in costs.items()}, dict.fromkeys(flat, 7.0 * unit))
        for unit in (1.0, 1 / 3600)
    )
    assert seconds is not None
    assert hours is not None
    assert seconds.at == pytest.approx(math.exp(7.0))
    assert hours.at == pytest.approx(seconds.at)
