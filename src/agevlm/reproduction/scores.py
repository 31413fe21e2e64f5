"""The numbers of a reproduction: answers and attention, of every measured row, seed and question.

Beside each number stand in brackets the bootstrap 95 % interval over the questions (of the mean over seeds, each
question in all seeds at once), in parentheses the lowest and highest seed. The interval of a difference is over
questions and seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from agevlm.evaluation import leaderboard, own, told
from agevlm.evaluation.benchmark import Benchmark, Row, units_of
from agevlm.evaluation.generate import PREDICTIONS
from agevlm.evaluation.inputs import without_pictures
from agevlm.evaluation.run import RESULT
from agevlm.evaluation.tables import lookup
from agevlm.stats import Measure, ResultKey, interval, mean, paired_difference, share
from agevlm.store import read_json, read_lines
from agevlm.training.stages.recipe import StageRecipe

from .matrix import BASELINE, GUIDED, GUIDED_TWICE, TWIN
from .prepare import EVALUATION, LANGUAGE, OWN, question_sets


@dataclass(frozen=True)
class Trained:
    """A row's model of one seed: the folder of its measurements, and of every stage recipe and folder."""

    measured: Path
    stages: list[tuple[StageRecipe, Path]]
    steps: int


SIMILARITY, PADDING = "similarity/similarity.json", "padding.json"  # in the folder of measurements
Found = Mapping[str, Mapping[int, Trained]]  # row -> seed -> what lies there
# Our row -> the paper's. Our twin stands for ConvLLaVA: one ConvNeXt tower, visual tokens in front of the text.
_PAPERS = {BASELINE: "CA-Baseline", GUIDED: "AGE-VLM", GUIDED_TWICE: "AGE-VLM-LM", TWIN: "ConvLLaVA"}


@dataclass(frozen=True)
class Answer:
    """A number of the answers to one benchmark.

    Args:
        path: of the benchmark's metrics.
        column: of the paper's Table 2; `factor` makes percent of it.
        is_race: more is better, so that answering blindly can be beaten.
        asked: set of questions (`prepare.QUESTIONS`).
    """

    title: str
    benchmark: str
    path: ResultKey
    column: str = ""
    factor: float = 1
    is_race: bool = True
    asked: str = EVALUATION

    @property
    def paper(self) -> dict[str, float]:
        """Row -> the paper's number in percent; empty where its Table 2 has none."""
        if not self.column:
            return {}
        place = leaderboard.TABLE_2.index(self.column)
        return {row: self.factor * leaderboard.PAPER[name][place] for row, name in _PAPERS.items()}


@dataclass(frozen=True)
class Look:
    """A number of the attention on rows with a mask, mean over cross layers; `benchmark`: of its questions alone.
    `is_ratio`: over what attention gives that is spread evenly. `asked`: set of questions."""

    title: str
    metric: str
    benchmark: str | None = None
    is_ratio: bool = False
    asked: str = EVALUATION


MASS, ACCURACY, UNREAD = "attention inside the mask", "POPE accuracy", "answers not read"
FALSE_YES = "POPE, false yes"
EVENLY, BLIND_LOOKS = "evenly", {"evenly": "uniform", "on the centre": "centre"}
TABLE_2 = (
    Answer("POPE F1", "pope", ("f1",), "POPE"),
    Answer(ACCURACY, "pope", ("accuracy",)),
    Answer("CV-Bench 2D", "cvbench", ("2D",), "CV-Bench 2D", 100),
    Answer("CV-Bench 3D", "cvbench", ("3D",), "CV-Bench 3D", 100),
    Answer("RealWorldQA", "realworldqa", ("accuracy",), "RealWorldQA", 100),
    Answer("Hallusion aAcc", "hallusionbench", ("aAcc",), "HallusionBench aAcc"),
    Answer("Hallusion fAcc", "hallusionbench", ("fAcc",), "fAcc"),
    Answer("Hallusion qAcc", "hallusionbench", ("qAcc",), "qAcc"),
    Answer("OCRBench", "ocrbench", ("accuracy",), "OCRBench scene", 0.5),  # a count out of 200
)
TASKS = (
    Answer("POPE, says yes", "pope", ("yes_ratio",), is_race=False),
    Answer(FALSE_YES, "pope", ("false_yes",), is_race=False),
    Answer("CV-Bench, counting", "cvbench", ("tasks", "Count")),
    Answer("CV-Bench, position", "cvbench", ("tasks", "Relation")),
    Answer("CV-Bench, in front", "cvbench", ("tasks", "Depth")),
    Answer("yes/no in words, no picture", told.PAPER.name, ("accuracy",), asked=LANGUAGE),
)
_OTHER = {"name": "unseen names", "style": "an unseen style", OWN: "own questions"}
OTHERS = tuple(
    Answer(f"{title}, {words}", own.PAPER.name if asked == OWN else "pope", path, is_race=is_race, asked=asked)
    for asked, words in _OTHER.items()
    for title, path, is_race in (("accuracy", ("accuracy",), True), ("false yes", ("false_yes",), False))
)
ANSWERS = (*TABLE_2, *TASKS, *OTHERS)
LOOKS = (
    Look(MASS, "in_mask_mass"),
    Look("times an even spread", "in_mask_mass", is_ratio=True),
    Look("points at it", "pointing_accuracy"),
    Look("POPE: attention inside the mask", "in_mask_mass", "pope"),
    Look("POPE: points at it", "pointing_accuracy", "pope"),
    Look("own questions: attention inside the mask", "in_mask_mass", asked=OWN),
    Look("own questions: points at it", "pointing_accuracy", asked=OWN),
)


@dataclass(frozen=True)
class Number:
    """One number of a row: of each seed the measure it comes from, over the same units of questions."""

    seeds: dict[int, Measure]
    units: np.ndarray

    @cached_property
    def over_seeds(self) -> Measure:
        return mean(list(self.seeds.values()))

    @cached_property
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


@dataclass
class Scores:
    """Row -> title -> number, and title -> what answers or looks without the picture reach, by their names."""

    numbers: dict[str, dict[str, Number]] = field(default_factory=dict)
    blind: dict[str, dict[str, float]] = field(default_factory=dict)

    def best_blind(self, title: str) -> tuple[str, float] | None:
        """The best way to answer blindly; of attention always an even spread. None where more is not better."""
        ways = self.blind.get(title)
        if not ways:
            return None
        name = EVENLY if EVENLY in ways else max(ways, key=lambda way: ways[way])
        return name, ways[name]

    def is_above_blind(self, row: str, title: str) -> bool:
        """Whether a number's whole interval is above what blind answers (or an even look) reach."""
        best = self.best_blind(title)
        return best is None or self.numbers[row][title].interval[0] > best[1]

    def difference(self, first: str, second: str, title: str) -> dict[str, Any] | None:
        """`second` - `first` over the seeds that both have: paired over questions and seeds, and for each seed."""
        one, other = (self.numbers.get(name, {}).get(title) for name in (first, second))
        if one is None or other is None:
            return None
        seeds = sorted(set(one.seeds) & set(other.seeds))
        if not seeds:
            return None
        pair = [[number.seeds[seed] for seed in seeds] for number in (one, other)]
        by_seed = {str(seed): other.seeds[seed].value() - one.seeds[seed].value() for seed in seeds}
        return {**paired_difference(pair[0], pair[1], one.units), "seeds": by_seed}


Model = tuple[str, int]  # a row and a seed


def read_scores(found: Found, scenes: Path, questions: Path | None = None) -> Scores:
    """All numbers of all measured rows.

    Rows of a benchmark that any model skipped are left out for all, so that numbers compare and pair.

    Args:
        questions: own ones, where rows were measured on them.
    """
    scores = Scores({row: {} for row in found})
    folders = {(row, seed): run.measured for row, runs in found.items() for seed, run in runs.items()}
    for name, _, benchmarks, data in question_sets(scenes, questions):
        # A step may have failed, or another call may be at it
        finished = {model: at / name for model, at in folders.items() if (at / name / RESULT).is_file()}
        units: dict[str, tuple[str, Any]] = {}  # id -> its benchmark, and what is drawn together with it
        asked: list[tuple[str, Any]] = []
        unread: dict[Model, list[np.ndarray]] = {model: [] for model in folders}
        for benchmark in benchmarks:
            rows = list(without_pictures(data[benchmark.name]))
            lines = {model: read_lines(at / benchmark.name / PREDICTIONS) for model, at in finished.items()}
            if lines:
                usable, answers = _read_answers(scores, name, benchmark, rows, lines)
                units |= {row["id"]: (benchmark.name, benchmark.unit(row)) for row in rows}
                asked += [units[row["id"]] for row in usable]
                for model, parsed in answers.items():
                    unread[model].append(np.array([answer is None for answer in parsed], dtype=float))
        if name == EVALUATION:
            _add(scores, UNREAD, {model: share(np.concatenate(parts)) for model, parts in unread.items()}, asked)
        _read_looks(scores, name, finished, units)
    return scores


def right_answers(run: Trained, benchmark: Benchmark) -> set[str]:
    """Ids of the questions that a row's model answers right."""
    lines = read_lines(run.measured / EVALUATION / benchmark.name / PREDICTIONS)
    return {line["id"] for line in lines if line["verdict"] == "correct"}


def _read_answers(
    scores: Scores, asked: str, benchmark: Benchmark, rows: Sequence[Row], lines: Mapping[Model, Sequence[Any]]
) -> tuple[list[Row], dict[Model, list[str | None]]]:
    """The numbers of one benchmark of a set of questions; the rows that no model skipped, and each model's answers."""
    kept = [i for i in range(len(rows)) if all(line[i]["verdict"] != "skipped" for line in lines.values())]
    usable = [rows[index] for index in kept]
    answers = {model: [line[index]["parsed"] for index in kept] for model, line in lines.items()}
    made = {model: benchmark.all_measures(usable, parsed) for model, parsed in answers.items()}
    guesses, units = benchmark.constants(usable), [benchmark.unit(row) for row in usable]
    for answer in (a for a in ANSWERS if (a.asked, a.benchmark) == (asked, benchmark.name)):
        blind = {name: lookup(guess, answer.path) for name, guess in guesses.items()} if answer.is_race else {}
        scores.blind[answer.title] = {name: value for name, value in blind.items() if value is not None}
        measures = {model: measure[answer.path] for model, measure in made.items() if answer.path in measure}
        _add(scores, answer.title, measures, units)
    return usable, answers


def _add(scores: Scores, title: str, measures: Mapping[Model, Measure], units: Sequence[Any]) -> None:
    """One number of all models that have it; `units`: what each question is drawn together with."""
    numbers = units_of(units)
    for row in dict.fromkeys(row for row, _ in measures):
        seeds = {seed: measure for (name, seed), measure in measures.items() if name == row}
        scores.numbers[row][title] = Number(seeds, numbers)


def _read_looks(
    scores: Scores, asked: str, folders: Mapping[Model, Path], units: Mapping[str, tuple[str, Any]]
) -> None:
    """Attention on the questions of a set that have a mask, where every model that has maps was measured."""
    records: dict[Model, dict[str, Any]] = {}
    for model, folder in folders.items():
        files = [folder / name / "grounding.jsonl" for name in dict(units.values())]
        if lines := [line for file in files if file.is_file() for line in read_lines(file)]:
            records[model] = {line["id"]: line for line in lines}
    common = [key for key in units if records and all(key in lines for lines in records.values())]
    for look in (look for look in LOOKS if look.asked == asked):
        chosen = [key for key in common if look.benchmark in (None, units[key][0])]
        if not chosen:
            continue
        first = next(iter(records.values()))
        blind = {
            name: np.array([first[key][prior][look.metric] for key in chosen]) for name, prior in BLIND_LOOKS.items()
        }
        even = blind[EVENLY] if look.is_ratio else np.ones(len(chosen))
        scale = 1 if look.is_ratio else 100

        def measure(values: Any, even: np.ndarray = even, scale: int = scale) -> Measure:
            return Measure(((1.0, np.asarray(values, dtype=float), even),), scale)

        scores.blind[look.title] = {name: measure(values).value() for name, values in blind.items()}
        measures = {
            model: measure([np.mean(lines[key][look.metric]) for key in chosen]) for model, lines in records.items()
        }
        _add(scores, look.title, measures, [units[key] for key in chosen])
    if asked != EVALUATION:
        return
    layers = {model: read_json(folders[model] / RESULT)["grounding"]["layers"] for model in records}
    for layer in sorted(set().union(*layers.values())):
        measures = {
            model: share([lines[key]["in_mask_mass"][layers[model].index(layer)] for key in common])
            for model, lines in records.items()
            if layer in layers[model]
        }
        title = layer_title(layer)
        scores.blind[title] = scores.blind[MASS]
        _add(scores, title, measures, [units[key] for key in common])


def spread(middle: float, values: Sequence[float], write: Callable[[float], str]) -> str:
    """A number over seeds: `middle (lowest to highest)`, of one seed alone."""
    return write(middle) + (f" ({write(min(values))} to {write(max(values))})" if len(values) > 1 else "")


def layer_title(layer: int | str) -> str:
    return f"{MASS}, layer {layer}"
