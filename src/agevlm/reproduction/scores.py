"""The numbers of a reproduction: Table 2's analogue and the attention inside the mask, per row, seed and question.

Two kinds of uncertainty stand beside each number and are never mixed: in brackets the bootstrap 95 % interval over the
questions (of the mean over seeds, each question in all seeds at once), in parentheses the lowest and highest seed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agevlm.evaluation.benchmark import Benchmark, units_of
from agevlm.evaluation.inputs import without_pictures as plain
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import load_scenes
from agevlm.evaluation.tables import lookup
from agevlm.reproduction.quickstart import SPLIT
from agevlm.stats import Measure, interval, mean, paired_difference, share


Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row -> seed -> see `reproduce.collect`
TABLE_2 = (
    ("pope", ("f1",), "POPE F1"),
    ("pope", ("accuracy",), "POPE accuracy"),
    ("cvbench", ("2D",), "CV-Bench 2D"),
    ("cvbench", ("3D",), "CV-Bench 3D"),
    ("realworldqa", ("accuracy",), "RealWorldQA"),
    ("hallusionbench", ("aAcc",), "Hallusion aAcc"),
    ("hallusionbench", ("fAcc",), "Hallusion fAcc"),
    ("hallusionbench", ("qAcc",), "Hallusion qAcc"),
    ("ocrbench", ("accuracy",), "OCRBench"),
)
MASS = "attention inside the mask"


@dataclass(frozen=True)
class Number:
    """One number of a row: of each seed, their mean's interval over questions, and the measures it comes from."""

    seeds: dict[int, Measure]
    units: np.ndarray

    @property
    def over_seeds(self) -> Measure:
        return mean(list(self.seeds.values()))

    @property
    def interval(self) -> list[float]:
        return interval(self.over_seeds, self.units)

    def text(self) -> str:
        values = [measure.value() for measure in self.seeds.values()]
        low, high = self.interval
        seeds = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        return f"{self.over_seeds.value():.1f} [{low:.1f}, {high:.1f}]{seeds}"

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.over_seeds.value(),
            "interval": self.interval,
            "seeds": {str(seed): measure.value() for seed, measure in self.seeds.items()},
        }


class Scores:
    """All numbers of all measured rows, read from the files of `found`.

    Rows of a benchmark that any model skipped are left out for all, so that numbers compare and pair.
    """

    def __init__(self, found: Found, scenes: Path):
        self.found = {name: runs for name, runs in found.items() if runs}
        self.benchmarks = [known["paper"] for known in BENCHMARKS.values()]
        data = load_scenes(scenes, SPLIT, self.benchmarks)
        self.rows: dict[str, list[Any]] = {}
        self.numbers: dict[str, dict[str, Number]] = {name: {} for name in self.found}
        self.constants: dict[str, float] = {}
        for benchmark in self.benchmarks:
            self._read_answers(benchmark, list(plain(data[benchmark.name])))
        self._read_looking()

    def _files(self, name: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
        return {
            (row, seed): read_lines(run["measured"] / "evaluation" / name)
            for row, runs in self.found.items()
            for seed, run in runs.items()
        }

    def _read_answers(self, benchmark: Benchmark, rows: list[Any]) -> None:
        predictions = self._files(f"{benchmark.name}/predictions.jsonl")
        kept = [
            index
            for index in range(len(rows))
            if all(lines[index]["verdict"] != "skipped" for lines in predictions.values())
        ]
        usable = self.rows[benchmark.name] = [rows[index] for index in kept]
        units = units_of([benchmark.unit(row) for row in usable])
        wanted = [(path, title) for name, path, title in TABLE_2 if name == benchmark.name]
        for path, title in wanted:
            scores = [
                value for made in benchmark.constants(usable).values() if (value := lookup(made, path)) is not None
            ]
            self.constants[title] = max(scores)
        for row, runs in self.found.items():
            measures = {}
            for seed in runs:
                lines = predictions[row, seed]
                parsed = [lines[index]["parsed"] for index in kept]
                measures[seed] = benchmark.all_measures(usable, parsed)
            for path, title in wanted:
                self.numbers[row][title] = Number({seed: made[path] for seed, made in measures.items()}, units)

    def _read_looking(self) -> None:
        """Attention inside the mask, mean over cross layers, on all questions that have one."""
        records: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for benchmark in self.benchmarks:
            for key, lines in self._files(f"{benchmark.name}/grounding.jsonl").items():
                records.setdefault(key, []).extend(lines)
        records = {key: lines for key, lines in records.items() if lines}
        if not records:
            return
        common = set.intersection(*({line["id"] for line in lines} for lines in records.values()))
        unit = {row["id"]: (b.name, b.unit(row)) for b in self.benchmarks for row in self.rows[b.name]}
        for row, runs in self.found.items():
            measures, units = {}, np.zeros(0, dtype=np.int64)
            for seed in runs:
                lines = [line for line in records.get((row, seed), []) if line["id"] in common]
                if lines:
                    measures[seed] = share([np.mean(line["in_mask_mass"]) for line in lines])
                    units = units_of([unit.get(line["id"], line["id"]) for line in lines])
                    self.constants[MASS] = 100 * float(np.mean([line["uniform"]["in_mask_mass"] for line in lines]))
            if measures:
                self.numbers[row][MASS] = Number(measures, units)

    def is_above_blind(self, row: str, title: str) -> bool:
        """Whether a number's whole interval is above what blind answers (or an even look) reach."""
        return self.numbers[row][title].interval[0] > self.constants[title]

    def difference(self, first: str, second: str, title: str) -> dict[str, Any] | None:
        """`second` - `first` over the seeds that both have: paired over questions, and for each seed."""
        one, other = (self.numbers.get(name, {}).get(title) for name in (first, second))
        if one is None or other is None:
            return None
        seeds = sorted(set(one.seeds) & set(other.seeds))
        if not seeds:
            return None
        pair = [mean([number.seeds[seed] for seed in seeds]) for number in (one, other)]
        by_seed = {str(seed): other.seeds[seed].value() - one.seeds[seed].value() for seed in seeds}
        return {**paired_difference(pair[0], pair[1], one.units), "seeds": by_seed}


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
