"""POPE: yes/no questions about the presence of objects, in three categories of negatives.

Protocol of VLMEvalKit: its prompt suffix and strict parsing. An answer that is not read counts as wrong and, for
precision and recall, as not "yes". Headline: F1 pooled over all rows; accuracy stands beside it.
"""

from collections.abc import Sequence

from .benchmark import Metrics, Row, percent
from .parsing import parse_yes_no


NAME = "pope"
PROTOCOL = "question + ' Please answer yes or no.'; strict yes/no (VLMEvalKit), unread answers are wrong"
FIELDS = ("id", "image", "question", "answer", "category")
SUFFIX = " Please answer yes or no."


def prompt(row: Row) -> str:
    return row["question"] + SUFFIX


def query(row: Row) -> str:
    return row["question"]


def gold(row: Row) -> str:
    return row["answer"].lower()


def parse(row: Row, output: str) -> str | None:
    return parse_yes_no(output)


def is_correct(row: Row, parsed: str | None) -> bool:
    return parsed == gold(row)


def score(rows: Sequence[Row], parsed: Sequence[str | None]) -> Metrics:
    """`accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (share of answers that say yes) and `unparsed`, pooled and
    per category, and `mean_category_f1`."""
    pairs = list(zip(rows, parsed, strict=True))
    # The public files have one category per row, or several joined by commas where duplicates were merged.
    names = sorted({name for row in rows for name in row["category"].split(",")})
    categories = {
        name: _score([(gold(row), answer) for row, answer in pairs if name in row["category"].split(",")])
        for name in names
    }
    return {
        "headline": "f1",
        **_score([(gold(row), answer) for row, answer in pairs]),
        "mean_category_f1": sum(metrics["f1"] for metrics in categories.values()) / len(categories),
        "categories": categories,
    }


def _score(pairs: Sequence[tuple[str, str | None]]) -> Metrics:
    right = sum(gold == said for gold, said in pairs)
    true_yes = sum(gold == said == "yes" for gold, said in pairs)
    said_yes = sum(said == "yes" for _, said in pairs)
    gold_yes = sum(gold == "yes" for gold, _ in pairs)
    return {
        "n": len(pairs),
        "accuracy": percent(right, len(pairs)),
        "precision": percent(true_yes, said_yes),
        "recall": percent(true_yes, gold_yes),
        "f1": percent(2 * true_yes, said_yes + gold_yes),
        "yes_ratio": percent(said_yes, len(pairs)),
        "unparsed": percent(sum(said is None for _, said in pairs), len(pairs)),
    }


def constants(rows: Sequence[Row]) -> dict[str, Metrics]:
    """Pooled metrics of one word said every time."""
    return {f"always {word}": _score([(gold(row), word) for row in rows]) for word in ("yes", "no")}
