"""Figures of the analyses as PNG files: histograms as in the paper's figure 2, and curves over layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agevlm.drawing import save_figure


MOST_TICKS = 12
MATCHED, MISMATCHED = "#1f77b4", "#d95f02"
COLORS = {
    "centroid": "#1f77b4",
    "pairwise": "#6baed6",
    "max": "#31a354",
    "centred": "#d95f02",
    "qk_cosine": "#756bb1",
    "qk_logit": "#9e9ac8",
}


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _beside(axes: Any) -> None:
    """The legend to the right of the curves, where it hides none of them."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)


def _draw_curve(axes: Any, entries: Sequence[Mapping[str, Any]], value: str, interval: str, **look: Any) -> None:
    """`value` of each layer's entry with the band of its interval."""
    layers = [entry["layer"] for entry in entries]
    low, high = zip(*(entry[interval] for entry in entries), strict=True)
    axes.plot(layers, [entry[value] for entry in entries], "o-", ms=3, **look)
    axes.fill_between(layers, low, high, color=look["color"], alpha=0.15, lw=0)


def _over_layers(axes: Any, layers: Sequence[int]) -> None:
    """Every layer is a tick, unless there are too many."""
    axes.set_xlabel("layer")
    if len(layers) <= MOST_TICKS:
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _bare(axes)


def save_histogram(
    matched: np.ndarray, mismatched: np.ndarray, name: str, numbers: Mapping[str, Any], output: Path
) -> None:
    """`histogram.png`: densities of both, on the range that there is."""
    figure = Figure(figsize=(5.2, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    low, high = min(matched.min(), mismatched.min()), max(matched.max(), mismatched.max())
    edges = np.linspace(low - 1e-6, high + 1e-6, 41).tolist()
    axes.hist(matched, edges, density=True, alpha=0.6, color=MATCHED, label="matching")
    axes.hist(mismatched, edges, density=True, alpha=0.6, color=MISMATCHED, label="non-matching")
    axes.set_xlabel(f"{numbers['measure']} cosine, layer {numbers['layer']}")
    axes.set_ylabel("density")
    axes.set_title(f"{name}: AUROC {numbers['auroc']:.3f}, overlap {numbers['overlap']:.2f}", fontsize=10)
    axes.legend(frameon=False)
    _bare(axes)
    save_figure(figure, output / "histogram.png")


def save_layers(measures: Mapping[str, Sequence[Mapping[str, Any]]], name: str, output: Path) -> None:
    """`layers.png`: AUROC with its interval per layer and measure, and the mean cosines that figure 2 shows."""
    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for measure, entries in measures.items():
        _draw_curve(left, entries, "auroc", "auroc_interval", color=COLORS[measure], label=measure)
    left.axhline(0.5, color="grey", lw=0.8, ls="--")
    left.set_ylabel("AUROC, matching over non-matching")
    for measure in ("centroid", "centred"):
        entries = measures[measure]
        layers = [entry["layer"] for entry in entries]
        for side, word, style in (("matched", "matching", "-"), ("mismatched", "non-matching", "--")):
            means = [entry[side]["mean"] for entry in entries]
            right.plot(layers, means, style, color=COLORS[measure], label=f"{measure}, {word}")
    right.set_ylabel("mean cosine")
    for axes in (left, right):
        _beside(axes)
        _over_layers(axes, [entry["layer"] for entry in measures["centroid"]])
    figure.suptitle(name, fontsize=10)
    save_figure(figure, output / "layers.png")


def save_padding(variants: Mapping[str, Mapping[str, Any]], name: str, output: Path) -> None:
    """`padding.png`: enrichment of the cells that padding leaves empty, per layer and variant, with intervals."""
    figure = Figure(figsize=(6.6, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    labels = {"own": "own processing", "pad": "padded, unmarked", "stretch": "stretched", "crop": "cropped"}
    colors = {"own": "#636363", "pad": MISMATCHED, "stretch": MATCHED, "crop": "#31a354"}
    for variant, entry in variants.items():
        entries = [layer for layer in entry["layers"] if layer["enrichment"] is not None]
        if not entries:
            continue  # nothing is padded
        _draw_curve(axes, entries, "enrichment", "interval", color=colors[variant], label=labels[variant])
    axes.axhline(1, color="grey", lw=0.8, ls="--")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("attention over area")
    axes.set_title(f"{name}: cells that padding leaves empty", fontsize=10)
    _beside(axes)
    _over_layers(axes, [layer["layer"] for layer in variants["pad"]["layers"]])
    save_figure(figure, output / "padding.png")


def save_rows(rows: Mapping[str, Mapping[str, Any]], what: str, blind: float, path: Path) -> None:
    """One line per row: its mean with its interval, every seed as a ring, and what looking at nothing gives.

    Args:
        rows: title -> `mean`, `interval`, `seeds` (seed -> value).
    """
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(rows.values()):
        axes.plot(entry["interval"], [place, place], color=MATCHED, lw=2, alpha=0.6)
        axes.plot(entry["mean"], place, "o", ms=5, color=MATCHED)
        axes.plot(
            list(entry["seeds"].values()), [place] * len(entry["seeds"]), "o", ms=6, mfc="none", color=MISMATCHED
        )
    axes.axvline(blind, color="grey", lw=0.8, ls="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(what)
    _bare(axes)
    save_figure(figure, path)
