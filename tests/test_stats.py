"""Intervals and tests: values equal plain means, intervals cover, pairs are compared as pairs."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agevlm.stats import all_right, count, interval, mcnemar, mean, paired_difference, share


flags = st.lists(st.booleans(), min_size=1, max_size=40)


@given(flags)
def test_values_are_plain_shares(right):
    assert share(right).value() == pytest.approx(100 * np.mean(right))
    assert count(right).value() == sum(right)
    assert mean([share(right), share([not r for r in right])]).value() == pytest.approx(50)


@given(flags, st.integers(1, 5))
def test_groups_are_right_if_all_their_rows_are(right, groups):
    keys = [index % groups for index in range(len(right))]
    expected = [all(r for r, key in zip(right, keys, strict=True) if key == group) for group in sorted(set(keys))]
    assert all_right(keys, np.array(right, float)).value() == pytest.approx(100 * np.mean(expected))


@given(flags)
def test_intervals_hold_the_value_and_repeat(right):
    units = np.arange(len(right))
    low, high = interval(share(right), units)
    assert 0 <= low <= share(right).value() + 1e-3 and share(right).value() - 1e-3 <= high <= 100 + 1e-3
    assert interval(share(right), units) == [low, high]


def test_intervals_cover_the_truth_as_often_as_they_say():
    """200 samples of 100 rows of a coin: the 95 % interval holds 50 in about 190."""
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = interval(share(random.random(100) < 0.5), np.arange(100))
        hits += low <= 50 <= high
    assert 180 <= hits <= 199


def test_rows_of_one_unit_are_drawn_together():
    """Six equal answers about each picture are worth one, not six: the interval is that of the pictures."""
    pictures = np.random.default_rng(2).random(100) < 0.5
    rows, units = np.repeat(pictures, 6), np.repeat(np.arange(100), 6)
    wide = interval(share(rows), units)
    narrow = interval(share(rows), np.arange(600))
    assert wide == pytest.approx(interval(share(pictures), np.arange(100)), abs=1e-3)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_pairs_tell_small_differences_that_intervals_do_not():
    """The second model is right wherever the first is, and on 12 rows more."""
    first = np.arange(400) % 2 == 0
    second = first.copy()
    second[1:24:2] = True
    units = np.arange(400)
    found = paired_difference(share(first), share(second), units)
    assert found["difference"] == pytest.approx(3)
    assert found["interval"][0] > 0 and found["p"] < 0.01
    assert interval(share(first), units)[1] > interval(share(second), units)[0], "apart they cannot be told"
    same = paired_difference(share(first), share(first), units)
    assert same["difference"] == 0 and same["p"] == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial(pairs):
    first, second = (np.array(side, float) for side in zip(*pairs, strict=True))
    found = mcnemar(first, second)
    a, b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    probabilities = [comb(a + b, k) / 2 ** (a + b) for k in range(a + b + 1)]
    expected = sum(p for p in probabilities if p <= probabilities[a] * (1 + 1e-12))
    assert (found["only_first"], found["only_second"]) == (a, b)
    assert found["p"] == pytest.approx(expected)
    assert mcnemar(second, first)["p"] == found["p"]
