"""Learning curves of a reproduction: presence against the questions that the stage of instructions has trained on.

Their questions are not those that are reported (`prepare.draw_questions`).
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agevlm.drawing import save_figure
from agevlm.training.curve import PRESENCE, QUESTIONS
from agevlm.training.lineage import read_lineage
from agevlm.training.run_stage import read_log

from .charts import over_seeds
from .matrix import ROWS
from .scores import Found, Trained


LEVELS = (0.75, 0.85, 0.90)  # of presence
# Of the page's lines, and more
COLORS = ("#7d828c", "#0b63c5", "#c2560c", "#7a3fb0", "#1a7f4b", "#8a6100", "#b3372f", "#444444")
Points = list[tuple[int, float]]  # (questions, presence)
Curves = dict[str, dict[int, Points]]  # row -> seed -> points


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
        spread = f" ({min(ends):.1f} to {max(ends):.1f})" if len(ends) > 1 else ""
        end = f"{statistics.mean(ends):.1f}{spread}"
        lines.append([ROWS[name].title, *reached, end, f"{most:,}", ", ".join(map(str, seeds))])
    return lines


def questions_text(values: Sequence[float], most: int) -> str:
    """The median over seeds (lowest to highest); the higher one of two in the middle."""

    def text(value: float) -> str:
        return f"> {most:,}" if math.isinf(value) else f"{int(value):,}"

    middle = text(statistics.median_high(values))
    return middle if len(values) == 1 else f"{middle} ({text(min(values))} to {text(max(values))})"


def draw_curves(curves: Curves, found: Found, path: Path) -> bool:
    """One line per row: the mean over seeds, and each seed's as a thin one. Returns whether there are curves."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

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
