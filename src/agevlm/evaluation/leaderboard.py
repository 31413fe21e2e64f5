"""The results page (docs/results.md) out of `metrics.json` files, beside the paper's Table 2.

The paper's rows are the paper's: printed in its Table 2, not measured here. Models evaluated on the published sets
stand beside them in its columns and units; models evaluated on scenes, which are other questions, in tables of their
own. A sentence in the field `note` of a file is printed above its tables.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agevlm.progress import written
from agevlm.store import read_json, write_text

from .benchmark import Column, Metrics
from .run import BENCHMARKS
from .tables import benchmark_lines, grounding_lines, language_lines, lookup, markdown_table


# Columns of Table 2, in its order
TABLE_2 = (
    "HallusionBench aAcc",
    "fAcc",
    "qAcc",
    "OCRBench scene",
    "OCRBench key info.",
    "CV-Bench 2D",
    "CV-Bench 3D",
    "RealWorldQA",
    "POPE",
)
PAPER = {
    "CA-Baseline": (40.38, 13.87, 11.21, 148, 51, 0.62, 0.50, 0.47, 85.11),
    "ConvLLaVA": (24.71, 8.96, 4.84, 117, 26, 0.59, 0.57, 0.51, 77.76),
    "mobile-vlm-v2": (44.37, 14.45, 11.65, 101, 2, 0.31, 0.40, 0.28, 84.30),
    "AGE-VLM": (43.85, 15.32, 11.21, 149, 59, 0.61, 0.52, 0.48, 87.34),
    "AGE-VLM-LM": (39.22, 11.56, 7.91, 126, 33, 0.66, 0.46, 0.51, 85.18),
}
# Of the public question files, whatever the pictures (tests/evaluation/test_benchmarks.py).
BLIND = {
    "always “yes”": {"aAcc": 42.17, "fAcc": 7.23, "qAcc": 4.62, "f1": 66.67},
    "always “no”": {"aAcc": 57.83, "fAcc": 12.14, "qAcc": 20.00, "f1": 0.0},
}
_INTRODUCTION = """# Results

Made by `agevlm results` from `metrics.json` files of `agevlm eval`; do not edit.

## The published benchmarks, in the columns and units of the paper's Table 2

**Rows marked “paper” are what the paper prints; nobody here has measured them.** Its HallusionBench numbers fit the
951 questions with a picture and strict reading, its POPE column is most likely F1, its CV-Bench is scored by a judge
it does not specify. Always answering “no” beats every row of the paper on aAcc and qAcc.
"""
_NEEDED = ("model", "data", "split", "protocol", "judge", "benchmarks", "grounding", "versions")
_NONE = "No model trained with this code has been evaluated on the published sets yet.\n"
_SCENES = """## Grounded scenes

Drawn scenes in the formats of the five benchmarks: other questions than theirs, not comparable with the table above.
In brackets: bootstrap 95 % intervals. “Without looking”: the best that a constant answer or chance reaches.
"""


def is_published(metrics: Metrics) -> bool:
    return metrics["data"] != "scenes"


def columns() -> list[tuple[str, Column]]:
    """(benchmark, column) of all benchmarks: those of Table 2 in its order, then the others."""
    found = [(name, column) for name, known in BENCHMARKS.items() for column in known["paper"].columns]
    place = {title: index for index, title in enumerate(TABLE_2)}
    return sorted(found, key=lambda pair: place.get(pair[1].title, len(place)))


def table_2(results: Sequence[Metrics]) -> str:
    """The paper's rows, answers without looking, then ours (a row as rules read it, one as the judge does)."""
    shown = columns()
    lines = [["", "source", *(column.title for _, column in shown)]]
    for name, values in PAPER.items():
        printed = dict(zip(TABLE_2, values, strict=True))
        numbers = [
            f"{printed[column.title]:.{column.digits}f}" if column.title in printed else "" for _, column in shown
        ]
        lines.append([name, "paper", *numbers])
    for name, known in BLIND.items():
        found = [known.get(column.path[-1]) for _, column in shown]
        lines.append([name, "question files", *("" if value is None else f"{value:.2f}" for value in found)])
    for metrics in results:
        source = f"ours, {metrics['protocol']}"
        lines.append([metrics["model"], source, *_cells(metrics["benchmarks"])])
        if metrics["judge"]:
            judged = {name: result.get("judged", {}) for name, result in metrics["benchmarks"].items()}
            lines.append([metrics["model"], f"{source}, judge {metrics['judge']}", *_cells(judged)])
    return markdown_table(lines)


def _cells(benchmarks: Mapping[str, Any]) -> list[str]:
    found = [(lookup(benchmarks, (name, *column.path)), column) for name, column in columns()]
    return ["" if value is None else f"{column.factor * value:.{column.digits}f}" for value, column in found]


def results_page(results: Sequence[Metrics]) -> str:
    """The whole page; models in the order given, scenes by split and protocol."""
    published = [metrics for metrics in results if is_published(metrics)]
    parts = [_INTRODUCTION, table_2(published)] + ([] if published else [_NONE])
    groups: dict[tuple[str, str], dict[str, Metrics]] = {}
    for metrics in results:
        if not is_published(metrics):
            models = groups.setdefault((metrics["split"], metrics["protocol"]), {})
            if metrics["model"] in models:
                raise ValueError(f"two results for {metrics['model']} on split {metrics['split']}; give one")
            models[metrics["model"]] = metrics
    if groups:
        parts.append(_SCENES)
    for (split, protocol), models in groups.items():
        parts.append(f"### Split {split}, protocol {protocol}\n")
        parts += [f"{model}: {metrics['note']}\n" for model, metrics in models.items() if "note" in metrics]
        names = dict.fromkeys(name for metrics in models.values() for name in metrics["benchmarks"])
        for name in names:
            having = {model: metrics for model, metrics in models.items() if name in metrics["benchmarks"]}
            first = next(iter(having.values()))["benchmarks"][name]
            parts += [f"**{name}**. {first['protocol']}\n", markdown_table(benchmark_lines(having, name))]
        looked = grounding_lines({model: metrics["grounding"] for model, metrics in models.items()})
        if looked:
            parts += ["**Where they look**, over all rows with a mask (0 to 1)\n", markdown_table(looked)]
    if language := language_lines({metrics["model"]: metrics for metrics in results}):
        parts += ["## Language ability\n", markdown_table(language)]
    versions = sorted({f"{name} {value}" for metrics in results for name, value in metrics["versions"].items()})
    return "\n".join([*parts, f"Versions: {', '.join(versions) or 'none'}.\n"])


def read_metrics(path: Path) -> Metrics:
    """A `metrics.json`.

    Raises:
        ValueError: it is none.
    """
    try:
        metrics = read_json(path)
        missing = [key for key in _NEEDED if key not in metrics]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if missing:
        raise ValueError(f"{path} is no metrics.json of `agevlm eval`: it lacks {', '.join(missing)}")
    return {**metrics, "model": metrics["model"] or path.parent.name}


def run_verb(arguments: argparse.Namespace) -> None:
    """`agevlm results`, with the arguments of `cli.py`."""
    write_text(arguments.output, results_page([read_metrics(path) for path in arguments.metrics]))
    written(arguments.output)


if __name__ == "__main__":  # as it was called, for one more release
    from agevlm.arguments import note_old
    from agevlm.evaluation import cli

    note_old("agevlm.evaluation.leaderboard", "`agevlm results`")
    cli.results()
