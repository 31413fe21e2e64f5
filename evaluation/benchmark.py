"""What every benchmark's file provides: pure functions from a row and a model's output to a verdict and to metrics.

A row is a mapping with the public columns of the benchmark. Shares are percentages, as the papers print them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


Row = Mapping[str, Any]
Metrics = dict[str, Any]


class Benchmark(Protocol):
    """A module of this folder, seen as a type.

    Attributes:
        NAME: of the files and of the results.
        PROTOCOL: prompt and parsing rule in words; it goes into every result.
        FIELDS: columns that must be there.
    """

    NAME: str
    PROTOCOL: str
    FIELDS: tuple[str, ...]

    def prompt(self, row: Row) -> str:
        """What the model is asked, without the picture's placeholder."""

    def query(self, row: Row) -> str:
        """The part of the prompt that says what to look at: the question without instructions and options."""

    def gold(self, row: Row) -> str:
        """The right answer, as people read it."""

    def parse(self, row: Row, output: str) -> str | None:
        """The answer found in `output`; None where there is none."""

    def is_correct(self, row: Row, parsed: str | None) -> bool:
        """Whether the answer is right. None never is."""

    def score(self, rows: Sequence[Row], parsed: Sequence[str | None]) -> Metrics:
        """Metrics over rows; at least `n`, `unparsed` (percent) and `headline`, the name of the metric to compare."""

    def constants(self, rows: Sequence[Row]) -> dict[str, Metrics]:
        """Metrics of answers given without looking: constant answers, chance."""


def check_fields(benchmark: Benchmark, columns: Sequence[str], where: str) -> None:
    """Raises ValueError if a column that `benchmark` needs is missing."""
    missing = [field for field in benchmark.FIELDS if field not in columns]
    if missing:
        raise ValueError(
            f"{where}: {benchmark.NAME} lacks the columns {', '.join(missing)}; it has {', '.join(columns)}. Rename "
            "or add them."
        )


def percent(part: float, whole: float) -> float:
    """`part` of `whole` in percent; 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def verdict(benchmark: Benchmark, row: Row, parsed: str | None) -> str:
    """ "unparsed", "correct" or "wrong"."""
    if parsed is None:
        return "unparsed"
    return "correct" if benchmark.is_correct(row, parsed) else "wrong"
