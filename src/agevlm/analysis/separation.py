"""How far two samples of scores lie apart: what figure 2 of the paper shows by eye, in numbers.

AUROC is the probability that a matched pair scores higher than a mismatched one, ties counting one half: 0.5 means
that nothing tells them apart, however high both score.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


BINS = 200
RESAMPLES = 1000


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
    """float32 `(n, n)`: 1 where matched pair i scores higher than mismatched pair j, 0.5 where they tie."""
    return ((matched[:, None] > mismatched) + 0.5 * (matched[:, None] == mismatched)).astype(np.float32)


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
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float32)
    resampled = ((counts @ table) * counts).sum(1) / n**2
    return {
        "matched": {"mean": float(matched.mean()), "std": float(matched.std(ddof=1))},
        "mismatched": {"mean": float(pooled.mean()), "std": float(pooled.std(ddof=1))},
        "overlap": overlap(matched, pooled, low, high),
        "cohens_d": cohens_d(matched, pooled),
        "auroc": float(table.mean(dtype=np.float64)),
        "auroc_seeds": [float(wins(matched, values).mean(dtype=np.float64)) for values in seeds],
        "auroc_interval": [float(value) for value in np.quantile(resampled, (0.025, 0.975))],
    }


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, low + 0.5)
