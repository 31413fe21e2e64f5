"""Statistics: metrics with intervals, comparisons of two models, and how far two samples of scores lie apart.

Metrics are ratios of sums over rows, so that one definition gives the value, its interval and paired differences.
Intervals are percentile bootstraps over units (rows that share a picture or are asked as a set are drawn together).
Two models answer the same rows, so their difference is resampled in pairs, and McNemar's exact test compares their
right answers row by row. Where models were trained with several seeds, a difference is resampled over seeds too.

AUROC is the probability that a matched pair scores higher than a mismatched one, ties counting one half: 0.5 means
that nothing tells them apart, however high both score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np


ResultKey = tuple[str, ...]
DRAWS = 1000
BINS = 200  # of histograms whose overlap is measured
_CHUNK = 4_000_000  # entries of a table of draws; more units are drawn in several


@dataclass(frozen=True)
class Measure:
    """`scale` times the weighted sum of ratios of sums over rows; a ratio of nothing is 0.

    `terms`: (weight, numerators (n,), denominators (n,)). `counts`: the value is a whole number.
    """

    terms: tuple[tuple[float, np.ndarray, np.ndarray], ...]
    scale: float = 100.0
    counts: bool = False

    def value(self) -> float:
        total = float(sum(w * _ratio(self.scale * top.sum(), below.sum()) for w, top, below in self.terms))
        return round(total) if self.counts else total

    def resampled(self, units: np.ndarray) -> np.ndarray:
        """Values `(DRAWS,)` on resampled units; the same units give the same draws every time."""
        number = int(units.max()) + 1
        sums = [
            (w, np.bincount(units, top, number), np.bincount(units, below, number)) for w, top, below in self.terms
        ]
        parts = []
        for counts in _draws(number):
            parts.append(sum(w * self.scale * _ratio(counts @ top, counts @ below) for w, top, below in sums))
        return np.concatenate(parts)


@lru_cache(maxsize=2)
def _draws(units: int) -> list[np.ndarray]:
    """How often each unit is drawn, `(DRAWS, units)` in chunks."""
    random, size = np.random.default_rng(0), max(1, _CHUNK // units)
    chances = np.full(units, 1 / units)
    return [
        random.multinomial(units, chances, size=min(size, DRAWS - start)).astype(np.float32)
        for start in range(0, DRAWS, size)
    ]


def _ratio(above: Any, below: Any) -> Any:
    below = np.asarray(below, dtype=float)
    return np.divide(above, below, out=np.zeros_like(below), where=below != 0)


def share(above: Any, below: Any = None) -> Measure:
    """100 times the sum of `above` over that of `below` (default: the number of rows)."""
    above = np.asarray(above, dtype=float)
    return Measure(((1.0, above, np.ones_like(above) if below is None else np.asarray(below, dtype=float)),))


def count(chosen: Any) -> Measure:
    """How many rows are chosen."""
    chosen = np.asarray(chosen, dtype=float)
    return Measure(((1.0, chosen, np.ones_like(chosen)),), scale=len(chosen), counts=True)


def mean(measures: Sequence[Measure]) -> Measure:
    """The plain mean of measures of one scale."""
    terms = tuple((weight / len(measures), top, below) for m in measures for weight, top, below in m.terms)
    return Measure(terms, measures[0].scale)


def all_right(keys: Sequence[Any], right: np.ndarray) -> Measure:
    """Share of groups all of whose rows are right; rows whose key is None belong to none. A group stands at its first
    row, so all its rows must be of one unit."""
    first: dict[Any, int] = {}
    above, below = np.zeros(len(keys)), np.zeros(len(keys))
    for index, key in enumerate(keys):
        if key is None:
            continue
        place = first.setdefault(key, index)
        above[place] = right[index] if place == index else min(above[place], right[index])
        below[place] = 1
    return share(above, below)


def nested(values: Mapping[ResultKey, Any]) -> dict[str, Any]:
    """{("a", "b"): 1} -> {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return result


def interval(measure: Measure, units: np.ndarray) -> list[float]:
    """95 % interval [low, high] of a measure."""
    return _middle(measure.resampled(units))


def _middle(values: np.ndarray) -> list[float]:
    """[low, high] of the middle 95 % of resampled values."""
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]


def paired_difference(first: Sequence[Measure], second: Sequence[Measure], units: np.ndarray) -> dict[str, Any]:
    """`difference` of two models' measures over the same rows (second - first, mean over seeds), its 95 % `interval`,
    and `p`, the two-sided bootstrap probability of a difference of 0.

    Args:
        first, second: a measure for each seed, in the same order. Every draw takes as many seeds with replacement, and
            the same units for all of them.
    """
    by_seed = np.array([b.resampled(units) - a.resampled(units) for a, b in zip(first, second, strict=True)])
    seeds, draws = by_seed.shape
    chosen = np.random.default_rng(1).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).T
    differences = (chosen * by_seed).sum(0) / seeds
    below, above = (1 + (differences <= 0).sum()), (1 + (differences >= 0).sum())
    return {
        "difference": mean(second).value() - mean(first).value(),
        "interval": _middle(differences),
        "p": float(min(1.0, 2 * min(below, above) / (1 + len(differences)))),
    }


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """McNemar's exact test on right answers (n,) of two models: rows that `only_first` and `only_second` got right,
    and `p`, the two-sided probability of such a split if both were equally good."""
    first, second = np.asarray(first) > 0.5, np.asarray(second) > 0.5
    a, b = int((first & ~second).sum()), int((second & ~first).sum())
    tail = sum(comb(a + b, k) for k in range(min(a, b) + 1))
    return {"only_first": a, "only_second": b, "p": min(1.0, 2 * tail / 2 ** (a + b))}


def derangement(n: int, seed: int) -> np.ndarray:
    """A random permutation of `range(n)` that leaves nothing in its place (one cycle through everything).

    Raises:
        ValueError: there is none.
    """
    if n < 2:
        raise ValueError(f"{n} pair(s): mismatched pairs need at least two")
    order = np.random.default_rng(seed).permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def overlap(first: np.ndarray, second: np.ndarray, low: float = -1.0, high: float = 1.0) -> float:
    """Overlap of two histograms, sum of min(p, q) on 200 bins: 1 for the same one, 0 for disjoint ones."""
    edges = np.linspace(low, high, BINS + 1)
    shares = [np.histogram(np.clip(values, low, high), edges)[0] / len(values) for values in (first, second)]
    return float(np.minimum(*shares).sum())


def cohens_d(first: np.ndarray, second: np.ndarray) -> float | None:
    """Difference of means over the root of the mean of both variances (so that more mismatched pairs do not weigh
    more); None where nothing varies."""
    pooled = ((first.var(ddof=1) + second.var(ddof=1)) / 2) ** 0.5
    return float((first.mean() - second.mean()) / pooled) if pooled > 0 else None


def wins(matched: np.ndarray, mismatched: np.ndarray) -> np.ndarray:
    """float32 `(n, m)`: 1 where matched pair i scores higher than mismatched pair j, 0.5 where they tie."""
    return ((matched[:, None] > mismatched) + 0.5 * (matched[:, None] == mismatched)).astype(np.float32)


def auroc(matched: np.ndarray, mismatched: np.ndarray) -> float:
    """The probability that one of `matched (n,)` is higher than one of `mismatched (m,)`, ties counting one half."""
    return float(wins(matched, mismatched).mean(dtype=np.float64))


def separation(matched: np.ndarray, mismatched: Sequence[np.ndarray], bounded: bool = True) -> dict[str, Any]:
    """Everything that tells matched from mismatched scores.

    Args:
        matched: `(n,)`, score of picture i with its own text.
        mismatched: one `(n,)` per seed, score of picture i with another's text.
        bounded: scores lie in [-1, 1]; otherwise the overlap's bins span what there is.

    Returns:
        `matched`, `mismatched` ({mean, std}; the latter over all seeds), `overlap`, `cohens_d`, `auroc` (mean over
        seeds), `auroc_seeds`, and `auroc_interval`, the 95 % interval of a bootstrap over pictures.
    """
    matched = np.asarray(matched, dtype=np.float64)
    seeds = [np.asarray(values, dtype=np.float64) for values in mismatched]
    pooled = np.concatenate(seeds)
    low, high = (-1.0, 1.0) if bounded else _range(np.concatenate([matched, pooled]))
    table = np.mean([wins(matched, values) for values in seeds], axis=0)
    n = len(matched)
    resampled = np.concatenate([((counts @ table) * counts).sum(1) for counts in _draws(n)]) / n**2
    return {
        "matched": {"mean": float(matched.mean()), "std": float(matched.std(ddof=1))},
        "mismatched": {"mean": float(pooled.mean()), "std": float(pooled.std(ddof=1))},
        "overlap": overlap(matched, pooled, low, high),
        "cohens_d": cohens_d(matched, pooled),
        "auroc": float(table.mean(dtype=np.float64)),
        "auroc_seeds": [auroc(matched, values) for values in seeds],
        "auroc_interval": _middle(resampled),
    }


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, low + 0.5)
