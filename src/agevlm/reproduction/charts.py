"""Training curves as inline SVG that takes its colors from the page, light or dark; no scripts."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import numpy as np

from agevlm.training.run_stage import read_log
from agevlm.training.stages.recipe import StageRecipe

from .matrix import ROWS
from .scores import Found


MOST_POINTS = 120
# What Matplotlib draws with -> the page's variable: of text, of rules, of the lines in their order.
_LINES = ("#0000f0", "#0000f1", "#0000f2", "#0000f3")
_COLORS = {"#0000fa": "soft", "#0000fb": "rule", **{color: f"v{index}" for index, color in enumerate(_LINES)}}

Points = Sequence[tuple[float, float]]  # (step, value)


def over_seeds(seeds: Sequence[Points]) -> np.ndarray:
    """`(4, n)`: step, mean, lowest and highest over seeds, neighbouring steps averaged where there are too many."""
    by_step: dict[float, list[float]] = {}
    for points in seeds:
        for step, value in points:
            by_step.setdefault(step, []).append(value)
    table = np.array([(step, np.mean(v), min(v), max(v)) for step, v in sorted(by_step.items())])
    return np.array([part.mean(0) for part in np.array_split(table, min(MOST_POINTS, len(table)))]).T


def line_chart(
    title: str, lines: Mapping[str, Sequence[Points]], stages: Mapping[str, float], percent: bool = False
) -> str:
    """A chart of the lines' means with bands from the lowest to the highest seed.

    Args:
        lines: title -> the points of each seed; at most four, one of them with points. The page has their legend.
        stages: name -> step at which the stage starts; drawn as dotted separators.
        percent: the values are shares, written as percentages.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    soft, rule = list(_COLORS)[:2]
    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for index, (name, seeds) in enumerate(lines.items()):
        if not any(seeds):
            continue
        steps, mean, low, high = over_seeds(seeds)
        if len(seeds) > 1:
            axes.fill_between(steps, low, high, color=_LINES[index], alpha=0.16, lw=0)
        width = max(1.2, 3.6 - 1.2 * index)  # where lines coincide, the earlier ones show as a rim
        axes.plot(steps, mean, color=_LINES[index], lw=width, label=name)
    for name, start in stages.items():
        axes.axvline(start, color=soft, lw=0.7, ls=":")
        axes.text(start, 1.02, f" {name}", transform=axes.get_xaxis_transform(), color=soft, fontsize=8)
    axes.grid(axis="y", color=rule, lw=0.7)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=soft, length=0, labelsize=8)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer steps", color=soft, fontsize=8)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    buffer = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    for color, variable in _COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def language_model_loss(entry: Mapping[str, Any], guidance_weight: float) -> float | None:
    """The logged `loss` without its guidance term, so that guided and unguided rows compare."""
    if "loss" not in entry:
        return None
    return entry["loss"] - guidance_weight * entry.get("guidance_loss", 0.0)


# Title, what reads a log entry (given the stage's guidance weight), whether it is a share.
CURVES: tuple[tuple[str, Callable[[Mapping[str, Any], float], float | None], bool], ...] = (
    ("Language-model loss", language_model_loss, False),
    ("Guidance loss (Eq. 3)", lambda entry, _: entry.get("guidance_loss"), False),
    ("Attention inside the mask", lambda entry, _: entry.get("in_mask_mass"), True),
)
Stage = tuple[StageRecipe, list[dict[str, Any]]]  # a recipe and the trainer's log


def timeline(stages: Sequence[Stage], read: Callable[[Mapping[str, Any], float], float | None]) -> list[Any]:
    """(step, value) over all stages of a run, each stage's steps counted on from the last one's."""
    points = []
    for (recipe, log), start in zip(stages, stage_starts(stages).values(), strict=True):
        for entry in log:
            value = read(entry, recipe.training["guidance_weight"])
            if value is not None:
                points.append((start + entry["step"], float(value)))
    return points


def stage_starts(stages: Sequence[Stage]) -> dict[str, int]:
    starts, start = {}, 0
    for recipe, log in stages:
        starts[recipe.name] = start
        start += max((entry["step"] for entry in log), default=0)
    return starts


def draw_charts(found: Found, rows: Sequence[str]) -> list[dict[str, Any]]:
    """{title, lines (their names), svg} of every curve that was logged, with a line for each row."""
    logs: dict[str, list[list[Stage]]] = {}
    for name in rows:
        runs = found[name].values()
        logs[ROWS[name].title] = [[(recipe, read_log(folder)) for recipe, folder in run.stages] for run in runs]
    starts = stage_starts(next(iter(logs.values()))[0])
    drawn: list[dict[str, Any]] = []
    for title, read, percent in CURVES:
        lines = {name: [timeline(stages, read) for stages in runs] for name, runs in logs.items()}
        if any(any(seeds) for seeds in lines.values()):
            drawn.append({"title": title, "lines": list(lines), "svg": line_chart(title, lines, starts, percent)})
    return drawn
