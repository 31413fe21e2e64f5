"""Curves of a reproduction: those of training as inline SVG that takes its colors from the page, light or dark; and
presence against the questions that the stage of instructions has trained on, as a picture and numbers.

The questions of these learning curves are not those that are reported (`prepare.draw_questions`).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from agevlm.drawing import save_figure
from agevlm.training.curve import PRESENCE, QUESTIONS
from agevlm.training.lineage import read_lineage
from agevlm.training.run_stage import read_log
from agevlm.training.stages.recipe import StageRecipe

from .matrix import ROWS
from .scores import Found, Trained, spread


MOST_POINTS = 120
# What Matplotlib draws with -> the page's variable: of text, of rules, of the lines in their order.
_LINES = tuple(f"#0000f{index}" for index in range(6))
_COLORS = {"#0000fa": "soft", "#0000fb": "rule", **{color: f"v{index}" for index, color in enumerate(_LINES)}}

Points = Sequence[tuple[float, float]]  # (step, value), or (questions, presence)
LEVELS = (0.75, 0.85, 0.90)  # of presence
# Of the page's lines, and more
COLORS = ("#7d828c", "#0b63c5", "#c2560c", "#7a3fb0", "#1a7f4b", "#8a6100", "#b3372f", "#444444")
Curves = dict[str, dict[int, Points]]  # row -> seed -> points


def over_seeds(seeds: Sequence[Points]) -> np.ndarray:
    """`(4, n)`: step, mean, lowest and highest over seeds, neighboring steps averaged where there are too many.

    A seed counts between its own steps too, by a straight line: else the mean jumps where seeds were measured at
    different steps.
    """
    steps = np.unique([step for points in seeds for step, _ in points])
    known = [np.array(points).T for points in seeds if points]
    lines = [np.interp(steps, own, values, left=np.nan, right=np.nan) for own, values in known]
    table = np.stack([steps, *(over(lines, axis=0) for over in (np.nanmean, np.nanmin, np.nanmax))], axis=1)
    return np.array([part.mean(0) for part in np.array_split(table, min(MOST_POINTS, len(table)))]).T


def line_chart(
    title: str, lines: Mapping[str, Sequence[Points]], stages: Mapping[str, float], percent: bool = False
) -> str:
    """A chart of the lines' means with bands from the lowest to the highest seed.

    Args:
        lines: title -> the points of each seed; at most `_LINES`, one of them with points. The page has their legend.
        stages: name -> step at which the stage starts; drawn as dotted separators.
        percent: the values are shares, written as percentages.
    """
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


# -- learning curves --------------------------------------------------------------------------------------------------


def read_curves(found: Found) -> Curves:
    """The curve of the last stage that has one, of every row and seed that have."""
    read = {name: {seed: _points(run) for seed, run in runs.items()} for name, runs in found.items()}
    drawn = {name: {seed: points for seed, points in seeds.items() if points} for name, seeds in read.items()}
    return {name: seeds for name, seeds in drawn.items() if seeds}


def _points(run: Trained) -> Points:
    logs = (read_log(folder) for _, folder in reversed(run.stages))
    curves = ([(entry[QUESTIONS], entry[PRESENCE]) for entry in log if PRESENCE in entry] for log in logs)
    return next(filter(None, curves), [])


def questions_to(level: float, points: Points) -> float:
    """The questions at the first point that reaches `level`; infinity where none does."""
    return next((questions for questions, presence in points if presence >= level), math.inf)


def curves_json(curves: Curves) -> dict[str, Any]:
    """Row -> seed -> its points, and its questions to each level (null: not reached)."""
    return {
        name: {
            str(seed): {
                "points": points,
                "questions_to": {
                    f"{100 * level:g}": None if math.isinf(q := questions_to(level, points)) else q for level in LEVELS
                },
            }
            for seed, points in seeds.items()
        }
        for name, seeds in curves.items()
    }


def curve_lines(curves: Curves) -> list[list[str]]:
    """One line per row: questions to each level, and presence at the end."""
    lines = [["", *(f"questions to {100 * level:g} %" for level in LEVELS), "at the end, %", "of questions", "seeds"]]
    for name, seeds in curves.items():
        most = min(points[-1][0] for points in seeds.values())
        reached = [questions_text([questions_to(level, p) for p in seeds.values()], most) for level in LEVELS]
        ends = [100 * points[-1][1] for points in seeds.values()]
        end = spread(statistics.mean(ends), ends, "{:.1f}".format)
        lines.append([ROWS[name].title, *reached, end, f"{most:,}", ", ".join(map(str, seeds))])
    return lines


def questions_text(values: Sequence[float], most: float) -> str:
    """The median over seeds (lowest to highest); the higher one of two in the middle."""

    def text(value: float) -> str:
        return f"> {most:,}" if math.isinf(value) else f"{int(value):,}"

    return spread(statistics.median_high(values), values, text)


def draw_curves(curves: Curves, found: Found, path: Path) -> bool:
    """One line per row: the mean over seeds, and each seed's as a thin one. Returns whether there are curves."""
    if not curves:
        return False
    figure = Figure(figsize=(7.6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, (name, seeds) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        for points in seeds.values() if len(seeds) > 1 else ():
            axes.plot(*zip(*points, strict=True), color=color, lw=0.8, alpha=0.4)
        questions, mean, _, _ = over_seeds(list(seeds.values()))
        axes.plot(questions, mean, color=color, lw=2.2, label=ROWS[name].title)
    for level in LEVELS:
        axes.axhline(level, color="grey", lw=0.5, ls=":")
    axes.axhline(_constant(curves, found), color="grey", lw=0.9, ls="--", label="best constant answer")
    axes.set_xlabel("questions trained on")
    axes.set_ylabel("presence answered right")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    save_figure(figure, path)
    return True


def _constant(curves: Curves, found: Found) -> float:
    """The share that the best constant answer gets right, of the questions of the first curve."""
    name, seeds = next(iter(curves.items()))
    lineages = (read_lineage(folder) or {} for _, folder in found[name][next(iter(seeds))].stages)
    yes = next(lineage["answers"]["yes"] for lineage in lineages if "answers" in lineage)
    return max(yes, 1 - yes)
