"""CV-Bench: multiple-choice questions on counting, spatial relation, depth and distance.

Prompt: the row's own `prompt` (question and options), as in VLMEvalKit. Parsing: option letter, else option text; the
rest is wrong, there is no judge. Headline: `overall`, the card's (2D + 3D) / 2 with each side averaged over its
sources, where a set has both sides; `accuracy` is the plain mean over rows.
"""

from collections.abc import Sequence

from .benchmark import Metrics, Row, percent
from .parsing import LETTERS, parse_choice


NAME = "cvbench"
PROTOCOL = "prompt column verbatim; option letter, else option text, unread answers are wrong (no judge)"
FIELDS = ("id", "image", "type", "task", "question", "choices", "answer", "prompt", "source")


def prompt(row: Row) -> str:
    return row["prompt"]


def query(row: Row) -> str:
    return row["question"]


def gold(row: Row) -> str:
    return row["answer"].strip("() ")


def parse(row: Row, output: str) -> str | None:
    return parse_choice(output, row["choices"])


def is_correct(row: Row, parsed: str | None) -> bool:
    return parsed == gold(row)


def score(rows: Sequence[Row], parsed: Sequence[str | None]) -> Metrics:
    """`accuracy` over all rows, `tasks` (accuracy of each), `2D` and `3D` where present, `overall`, `unparsed`."""
    credits = [float(is_correct(row, answer)) for row, answer in zip(rows, parsed, strict=True)]
    return {**_aggregate(rows, credits), "unparsed": percent(sum(answer is None for answer in parsed), len(rows))}


def _aggregate(rows: Sequence[Row], credits: Sequence[float]) -> Metrics:
    """`credits`: expected correctness of each row, 0 to 1."""

    def mean(**wanted: str) -> float:
        chosen = [
            credit
            for row, credit in zip(rows, credits, strict=True)
            if all(row[field] == value for field, value in wanted.items())
        ]
        return percent(sum(chosen), len(chosen))

    sides = {}
    for side in sorted({row["type"] for row in rows}):
        sources = sorted({row["source"] for row in rows if row["type"] == side})
        sides[side] = sum(mean(type=side, source=source) for source in sources) / len(sources)
    return {
        "headline": "overall",
        "n": len(rows),
        "accuracy": percent(sum(credits), len(rows)),
        "tasks": {task: mean(task=task) for task in sorted({row["task"] for row in rows})},
        **sides,
        "overall": sum(sides.values()) / len(sides),
    }


def constants(rows: Sequence[Row]) -> dict[str, Metrics]:
    """Each letter as a constant answer, and `chance`: the expected score of a uniformly drawn option."""
    letters = LETTERS[: max(len(row["choices"]) for row in rows)]
    always = {f"always ({letter})": score(rows, [letter] * len(rows)) for letter in letters}
    chance = {**_aggregate(rows, [1 / len(row["choices"]) for row in rows]), "unparsed": 0.0}
    return {**always, "chance": chance}
