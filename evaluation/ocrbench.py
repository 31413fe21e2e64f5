"""OCRBench (v1): reading text. Right if a gold answer is contained in the output.

Comparison ignores case and takes line breaks for spaces; handwritten formulas (HME100k) are compared with all spaces
removed and case kept. Headline: `final`, the count of right answers; 1000 in the public set. No accent or number
normalisation, as in the official script.
"""

from collections import Counter
from collections.abc import Sequence

from .benchmark import Metrics, Row, percent


NAME = "ocrbench"
PROTOCOL = "question verbatim; a gold answer is contained in the output (official rule)"
FIELDS = ("id", "image", "dataset", "question", "question_type", "answer")


def prompt(row: Row) -> str:
    return row["question"]


def query(row: Row) -> str:
    return row["question"]


def _golds(row: Row) -> list[str]:
    return [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])


def gold(row: Row) -> str:
    return " | ".join(_golds(row))


def _normalise(row: Row, text: str) -> str:
    if row["dataset"] == "HME100k":
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")


def parse(row: Row, output: str) -> str | None:
    """The normalised output; None if it is empty."""
    return _normalise(row, output) or None


def is_correct(row: Row, parsed: str | None) -> bool:
    return parsed is not None and any(_normalise(row, answer) in parsed for answer in _golds(row))


def score(rows: Sequence[Row], parsed: Sequence[str | None]) -> Metrics:
    """`final` and `categories`: counts of right answers; `accuracy` in percent."""
    right = [is_correct(row, answer) for row, answer in zip(rows, parsed, strict=True)]
    counts = Counter(row["question_type"] for row, good in zip(rows, right, strict=True) if good)
    return {
        "headline": "final",
        "n": len(rows),
        "final": sum(right),
        "accuracy": percent(sum(right), len(rows)),
        "categories": {name: counts[name] for name in sorted({row["question_type"] for row in rows})},
        "unparsed": percent(sum(answer is None for answer in parsed), len(rows)),
    }


def constants(rows: Sequence[Row]) -> dict[str, Metrics]:
    """The most frequent gold answer, given every time."""
    word = Counter(answer for row in rows for answer in set(_golds(row))).most_common(1)[0][0]
    return {f"always '{word}'": score(rows, [parse(row, word) for row in rows])}
