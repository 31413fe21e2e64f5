"""RealWorldQA: free questions, some with lettered options inside the question. There is no official scorer.

With options ("A. text" lines): option letter, else option text. Without: the whole output must equal the gold answer
after normalisation (case, punctuation, article, number words); it is not enough that it contains it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from .benchmark import Metrics, Row, percent
from .parsing import LETTERS, number_value, parse_choice, simplify


NAME = "realworldqa"
PROTOCOL = "question verbatim; option letter or text, open answers by normalised equality (no judge)"
FIELDS = ("id", "image", "question", "answer")
_OPTION = re.compile(r"^([A-J])[.)] +(.+)$", flags=re.MULTILINE)


def options(row: Row) -> list[str]:
    """The options' texts, in order; empty for an open question."""
    found = _OPTION.findall(row["question"])
    in_order = "".join(letter for letter, _ in found) == LETTERS[: len(found)]
    return [text.strip() for _, text in found] if len(found) > 1 and in_order else []


def prompt(row: Row) -> str:
    return row["question"]


def query(row: Row) -> str:
    """The question's first line: options and instructions stand on lines of their own."""
    return row["question"].split("\n", 1)[0]


def gold(row: Row) -> str:
    return row["answer"]


def _normalise(text: str) -> str:
    text = re.sub(r"^(?:the answer is |a |an |the )+", "", simplify(text))
    return number_value(text) or text


def parse(row: Row, output: str) -> str | None:
    choices = options(row)
    return parse_choice(output, choices) if choices else _normalise(output) or None


def _right(row: Row) -> str:
    return gold(row).strip() if options(row) else _normalise(gold(row))


def is_correct(row: Row, parsed: str | None) -> bool:
    return parsed == _right(row)


def score(rows: Sequence[Row], parsed: Sequence[str | None]) -> Metrics:
    """`accuracy`, also apart for `choice` and `open` questions where present, and `unparsed`."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, parsed, strict=True):
        right["choice" if options(row) else "open"].append(is_correct(row, answer))
    return {
        "headline": "accuracy",
        "n": len(rows),
        "accuracy": percent(sum(map(sum, right.values())), len(rows)),
        **{kind: percent(sum(verdicts), len(verdicts)) for kind, verdicts in sorted(right.items())},
        "unparsed": percent(sum(answer is None for answer in parsed), len(rows)),
    }


def constants(rows: Sequence[Row]) -> dict[str, Metrics]:
    """The most frequent answer to choice questions and to open ones, given every time."""
    golds: dict[bool, Counter[str]] = defaultdict(Counter)
    for row in rows:
        golds[bool(options(row))][_right(row)] += 1
    best = {has_options: counts.most_common(1)[0][0] for has_options, counts in golds.items()}
    name = " / ".join(f"'{best[has_options]}'" for has_options in sorted(best, reverse=True))
    return {f"always {name}": score(rows, [best[bool(options(row))] for row in rows])}
