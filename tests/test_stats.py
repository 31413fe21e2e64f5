"""Intervals and tests: values equal plain means, intervals cover, pairs are compared as pairs."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm.stats import (
    all_right,
    auroc,
    cohens_d,
    count,
    derangement,
    interval,
    mcnemar,
    mean,
    overlap,
    paired_difference,
    separation,
    share,
)


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
    found = paired_difference([share(first)], [share(second)], units)
    assert found["difference"] == pytest.approx(3)
    assert found["interval"][0] > 0 and found["p"] < 0.01
    assert interval(share(first), units)[1] > interval(share(second), units)[0], "apart they cannot be told"
    same = paired_difference([share(first)], [share(first)], units)
    assert same["difference"] == 0 and same["p"] == 1


def test_seeds_that_disagree_widen_a_difference():
    random, units = np.random.default_rng(0), np.arange(2000)

    def seeds(*shares):
        return [share(random.random(2000) < part) for part in shares]

    base = seeds(0.5, 0.5, 0.5)
    steady, mixed = (paired_difference(base, seeds(*shares), units) for shares in ((0.6,) * 3, (0.8, 0.45, 0.55)))
    assert steady["difference"] == pytest.approx(10, abs=2) and mixed["difference"] == pytest.approx(10, abs=2)
    assert steady["interval"][0] > 0 > mixed["interval"][0]
    # The weakest seed three times over is one draw of 27
    assert mixed["interval"][0] == pytest.approx(-5, abs=4) and mixed["interval"][1] == pytest.approx(30, abs=4)


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


@given(st.integers(2, 60), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_no_pair_is_left_in_its_place(n, seed):
    partner = derangement(n, seed)
    assert sorted(partner) == list(range(n)) and (partner != np.arange(n)).all()
    np.testing.assert_array_equal(partner, derangement(n, seed))


def test_separation_of_known_samples():
    generator = np.random.default_rng(0)
    base = generator.normal(0, 0.1, 400)
    same = separation(base, [base, base])
    assert same["auroc"] == 0.5 and same["overlap"] == 1 and same["cohens_d"] == 0
    apart = separation(base + 0.9, [base - 0.9])
    assert apart["auroc"] == 1 and apart["overlap"] == 0 and apart["auroc_interval"] == [1, 1]
    constant = separation(np.ones(5), [np.ones(5)])
    assert constant["auroc"] == 0.5 and constant["cohens_d"] is None
    # Normals one deviation apart: d = 1, AUROC = Phi(1 / sqrt 2) = 0.760.
    shifted = separation(base + 0.1, [generator.normal(0, 0.1, 400), generator.normal(0, 0.1, 400)])
    assert shifted["cohens_d"] == pytest.approx(1, abs=0.15)
    assert shifted["auroc"] == pytest.approx(0.76, abs=0.03)
    assert shifted["auroc"] == pytest.approx(np.mean(shifted["auroc_seeds"]))
    low, high = shifted["auroc_interval"]
    assert low < shifted["auroc"] < high and 0.03 < high - low < 0.09
    assert overlap(np.array([0.0, 0.5]), np.array([0.5, 0.5])) == 0.5


def test_the_interval_holds_the_truth():
    """In about 95 of 100 samples of two equal distributions the interval holds 0.5."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        low, high = separation(generator.normal(size=60), [generator.normal(size=60)])["auroc_interval"]
        held += low <= 0.5 <= high
    assert held >= 88


def test_separation_derived_again():
    """AUROC from ranks (Mann-Whitney, ties one half), overlap bin by bin, d by its formula, and the interval from
    pictures drawn one by one: a picture brings its matched and all its mismatched scores along."""
    generator = np.random.default_rng(3)
    quality = generator.normal(0, 0.2, 60)  # a picture's own: its scores belong together
    matched = np.round((quality + generator.normal(0.1, 0.05, 60)).clip(-1, 1), 2)  # rounded: ties
    mismatched = [np.round((quality + generator.normal(0.0, 0.05, 60)).clip(-1, 1), 2) for _ in range(2)]
    result = separation(matched, mismatched)

    def by_ranks(first, second):
        both = np.sort(np.concatenate([first, second]))
        ranks = (np.searchsorted(both, first, "left") + np.searchsorted(both, first, "right") + 1) / 2
        return (ranks.sum() - len(first) * (len(first) + 1) / 2) / (len(first) * len(second))

    by_seed = [by_ranks(matched, values) for values in mismatched]
    assert by_seed == pytest.approx([auroc(matched, values) for values in mismatched])
    assert result["auroc_seeds"] == pytest.approx(by_seed, abs=1e-6)
    assert result["auroc"] == pytest.approx(np.mean(by_seed), abs=1e-6)
    pooled = np.concatenate(mismatched)
    low = np.floor((np.arange(200) / 100 - 1) * 1e9) / 1e9
    shares = [[np.mean((v >= a - 1e-12) & (v < a + 0.01 - 1e-12)) for a in low] for v in (matched, pooled)]
    assert result["overlap"] == pytest.approx(np.minimum(*shares).sum(), abs=0.06)  # scores lie on the bins' edges
    spread = np.sqrt((np.std(matched, ddof=1) ** 2 + np.std(pooled, ddof=1) ** 2) / 2)
    assert cohens_d(matched, pooled) == pytest.approx((matched.mean() - pooled.mean()) / spread)
    draws = [generator.integers(0, 60, 60) for _ in range(2000)]
    again = [np.mean([by_ranks(matched[draw], values[draw]) for values in mismatched]) for draw in draws]
    np.testing.assert_allclose(result["auroc_interval"], np.quantile(again, (0.025, 0.975)), atol=0.015)
    # Both resampled on their own would say less than is known: what a picture's scores have in common cancels.
    apart = [
        np.mean([by_ranks(matched[one], values[other]) for values in mismatched])
        for one, other in zip(draws[:1000], draws[1000:], strict=True)
    ]
    low, high = result["auroc_interval"]
    assert high - low < 0.75 * float(np.diff(np.quantile(apart, (0.025, 0.975)))[0])
