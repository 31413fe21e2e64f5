"""What a benchmark is: pure functions from a row and a model's output to a verdict and to metrics, and its protocols.

A row is a mapping with the published columns of the benchmark. A protocol is a harness's way to ask and to read:
`paper` (VLMEvalKit's prompts and strict reading, the likely source of the paper's Table 2), `official`, `lmms-eval`,
`cambrian`. Each is one `Benchmark`; a benchmark's file makes the others from `paper` by replacing what differs.
Shares are percentages, as the papers print them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agevlm.stats import Measure, ResultKey, interval, nested, share

from .parsing import LETTERS


Row = Mapping[str, Any]
Metrics = dict[str, Any]
Answers = Sequence[str | None]
Credits = Sequence[float] | np.ndarray | None  # None: as the answers deserve
Guesses = dict[str, tuple[Answers, Credits]]
PROTOCOLS = ("paper", "official", "lmms-eval", "cambrian")
YES_NO = ("yes", "no")
RIGHT, WRONG = "correct", "incorrect"


@dataclass(frozen=True)
class Source:
    """Where the published rows are, and how they differ from ours.

    Attributes:
        hub: the data set's id on the Hub.
        config: its configuration there.
        splits: its splits.
        files: names of the published files.
        renamed: published column -> ours; the first that is there is taken.
        number: what numbers a row in the published set; None: its place.
        from_name: columns that a file's name without suffix gives.
        tables: names of VLMEvalKit's files.
        from_table: a row of them in the published columns. KeyError names a column that is not there.
    """

    hub: str = ""
    config: str | None = None
    splits: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    number: Callable[[Row], tuple] | None = None
    from_name: Callable[[str], Mapping[str, Any]] = lambda stem: {}
    tables: tuple[str, ...] = ()
    from_table: Callable[[Row], Row] = lambda row: row


@dataclass(frozen=True)
class Column:
    """A metric in tables: its title, its path, the factor into published units, decimals."""

    title: str
    path: ResultKey
    factor: float = 1
    digits: int = 2


@dataclass(frozen=True)
class Benchmark:
    """One benchmark under one protocol.

    Attributes:
        rule: prompt and reading rule in words; it goes into every result.
        source: where the published rows are.
        columns: the benchmark's columns beside the paper's Table 2.
        fields: columns that must be there.
        uses: which rows take part.
        prompt: what the model is asked, without the picture's placeholder. Default: the question.
        query: the part of the prompt that says what to look at: the question without instructions and options.
        gold: the right answer, as people read it.
        parse: the answer found in an output; None where there is none.
        is_correct: whether a found answer is right. None never is.
        measures: metrics of rows from their found answers and their credits (0 to 1, see `credits`).
        guesses: answers given without looking, by name: an answer and a credit (None: as the answer deserves) a row.
        unit: rows of one unit are drawn together for intervals: they share a picture or are asked as a set. Default:
            each row is one.
        headline: the metric to compare.
        shown: metrics on the terminal; without any the headline.
        labels: the answers a judge may find; empty where answers are free and a judge says right or wrong.
        credit: what a judge's word on a free answer is worth.
        judged_only: the protocol has no rule-based reading; the judged column is its result.
        max_new_tokens: longest answer.
        note: what else to say of the rows beside the rule.
    """

    name: str
    rule: str
    fields: tuple[str, ...]
    headline: str
    gold: Callable[[Row], str]
    parse: Callable[[Row, str], str | None]
    is_correct: Callable[[Row, str | None], bool]
    measures: Callable[[Sequence[Row], Answers, np.ndarray], dict[ResultKey, Measure]]
    guesses: Callable[[Sequence[Row]], Guesses]
    labels: Callable[[Row], tuple[str, ...]]
    source: Source = Source()
    columns: tuple[Column, ...] = ()
    prompt: Callable[[Row], str] = lambda row: row["question"]
    query: Callable[[Row], str] = lambda row: row["question"]
    unit: Callable[[Row], Any] = lambda row: row["id"]
    uses: Callable[[Row], bool] = lambda row: True
    credit: Callable[[Row, str], float] = lambda row, label: float(label == RIGHT)
    shown: tuple[str, ...] = ()
    judged_only: bool = False
    protocol: str = "paper"
    max_new_tokens: int = 128
    note: Callable[[Iterable[Row]], str] = lambda rows: ""

    def credits(self, rows: Sequence[Row], parsed: Answers) -> np.ndarray:
        """1 for each right answer, else 0."""
        return np.array([self.is_correct(row, answer) for row, answer in zip(rows, parsed, strict=True)], dtype=float)

    def all_measures(self, rows: Sequence[Row], parsed: Answers, credits: Credits = None) -> dict[ResultKey, Measure]:
        """The benchmark's own measures and the share of answers in which nothing was found."""
        earned = self.credits(rows, parsed) if credits is None else np.asarray(credits, dtype=float)
        measures = self.measures(rows, parsed, earned)
        measures.setdefault(("unparsed",), share(np.array([answer is None for answer in parsed], dtype=float)))
        return measures

    def score(self, rows: Sequence[Row], parsed: Answers, credits: Credits = None) -> Metrics:
        """Metrics over rows: `headline` (the name of the metric to compare), `n`, and those of the benchmark."""
        values = {path: measure.value() for path, measure in self.all_measures(rows, parsed, credits).items()}
        return {"headline": self.headline, "n": len(rows), **nested(values)}

    def intervals(self, rows: Sequence[Row], parsed: Answers, credits: Credits = None) -> Metrics:
        """Bootstrap 95 % intervals [low, high] of the metrics, in their layout; units are drawn whole."""
        units = units_of([self.unit(row) for row in rows])
        measures = self.all_measures(rows, parsed, credits)
        return nested({path: interval(measure, units) for path, measure in measures.items() if path[-1] != "n"})

    def constants(self, rows: Sequence[Row]) -> dict[str, Metrics]:
        """Metrics of answers given without looking: constant answers, chance."""
        return {name: self.score(rows, *guess) for name, guess in self.guesses(rows).items()}


def protocols(paper: Benchmark, **changes: Mapping[str, Any]) -> dict[str, Benchmark]:
    """A benchmark's protocols by name: `paper` and what differs from it (`lmms_eval` is `lmms-eval`)."""
    named = {name.replace("_", "-"): change for name, change in changes.items()}
    return {"paper": paper, **{name: replace(paper, protocol=name, **change) for name, change in named.items()}}


def among(chosen: Any, values: Any) -> Measure:
    """100 times the mean of `values` over the chosen rows."""
    chosen = np.asarray(chosen, dtype=float)
    return share(np.asarray(values, dtype=float) * chosen, chosen)


def always(answers: Mapping[str, str], rows: Sequence[Row]) -> Guesses:
    """Guesses: one answer for every row, by name."""
    return {name: ([answer] * len(rows), None) for name, answer in answers.items()}


def units_of(keys: Sequence[Any]) -> np.ndarray:
    """Numbers of the units that rows belong to, 0, 1, ... in order of appearance."""
    numbers: dict[Any, int] = defaultdict(lambda: len(numbers))
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def check_fields(benchmark: Benchmark, columns: Sequence[str], where: str) -> None:
    """Raises ValueError if a column that `benchmark` needs is missing."""
    missing = [field for field in benchmark.fields if field not in columns]
    if missing:
        raise ValueError(
            f"{where}: {benchmark.name} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}. Rename "
            "or add them."
        )


def check_row(benchmark: Benchmark, row: Row, where: str) -> None:
    """Raises ValueError if a field that `benchmark` needs is empty or of another type, or its right answer unknown."""
    for name in benchmark.fields:
        if row.get(name, "") is None:
            raise ValueError(f"{where}, row {row['id']}, field {name}: null; fill it in, or leave the row out")
    try:
        benchmark.prompt(row)
        found, known = benchmark.gold(row), benchmark.labels(row)
        row.get("category", "").split()
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        there = ", ".join(f"{name} ({type(row[name]).__name__})" for name in benchmark.fields if name in row)
        raise ValueError(f"{where}, row {row['id']}: a field is of another type: {there}; correct the row") from error
    if not found.strip() or (known and found.lower() not in {label.lower() for label in known}):
        wanted = f"one of {', '.join(known)}" if known else "a text"
        raise ValueError(f"{where}, row {row['id']}: the right answer is {found!r}, not {wanted}; correct the row")


def table_options(row: Row) -> list[str]:
    """The options of a row of VLMEvalKit's, which are in the columns A, B, ..."""
    return [row[letter] for letter in LETTERS if row.get(letter)]


def verdict(benchmark: Benchmark, row: Row, parsed: str | None) -> str:
    """ "unparsed", "correct" or "wrong"."""
    if parsed is None:
        return "unparsed"
    return "correct" if benchmark.is_correct(row, parsed) else "wrong"
