"""RealWorldQA: free questions, some with lettered options inside the question. There is no official scorer.

`paper`: with options ("A. text" lines) the option's letter, else its text; without, the whole output must equal the
gold answer after normalisation (case, punctuation, article, number words); it is not enough that it contains it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from agevlm.stats import Measure, ResultKey, share

from .benchmark import Answers, Benchmark, Column, Guesses, Row, Source, among, protocols
from .harnesses import cambrian_word, lmms_choice
from .parsing import LETTERS, number_value, parse_choice, simplify


_OPTION = re.compile(r"^([A-J])[.)] +(.+)$", flags=re.MULTILINE)


def options(row: Row) -> list[str]:
    """The options' texts, in order; empty for an open question."""
    found = _OPTION.findall(row["question"])
    in_order = "".join(letter for letter, _ in found) == LETTERS[: len(found)]
    return [text.strip() for _, text in found] if len(found) > 1 and in_order else []


def _normalize(text: str) -> str:
    text = re.sub(r"^(?:the answer is |a |an |the )+", "", simplify(text))
    return number_value(text) or text


def parse(row: Row, output: str) -> str | None:
    choices = options(row)
    return parse_choice(output, choices) if choices else _normalize(output) or None


def right_answer(row: Row) -> str:
    return row["answer"].strip() if options(row) else _normalize(row["answer"])


def measures(rows: Sequence[Row], parsed: Answers, credits: np.ndarray) -> dict[ResultKey, Measure]:
    """`accuracy`, also apart for `choice` and `open` questions where present."""
    kinds = ["choice" if options(row) else "open" for row in rows]
    return {
        ("accuracy",): share(credits),
        **{(kind,): among([kind == other for other in kinds], credits) for kind in sorted(set(kinds))},
    }


def guesses(rows: Sequence[Row]) -> Guesses:
    """The most frequent answer to choice questions and to open ones, given every time."""
    found: dict[bool, Counter[str]] = defaultdict(Counter)
    for row in rows:
        found[bool(options(row))][right_answer(row)] += 1
    best = {has_options: counts.most_common(1)[0][0] for has_options, counts in found.items()}
    name = " / ".join(f"'{best[has_options]}'" for has_options in sorted(best, reverse=True))
    return {f"always {name}": ([best[bool(options(row))] for row in rows], None)}


def _lmms_parse(row: Row, output: str) -> str | None:
    if row["answer"].strip().upper() in ("A", "B", "C", "D"):
        return lmms_choice(output)
    return output.lower().strip().rstrip(".") or None


def _same(row: Row, parsed: str | None) -> bool:
    return parsed is not None and parsed.lower() == row["answer"].strip().lower()


PAPER = Benchmark(
    name="realworldqa",
    rule="question verbatim; option letter or text, open answers by normalised equality (judged column: judge)",
    source=Source("xai-org/RealworldQA", None, ("test",)),
    columns=(Column("RealWorldQA", ("accuracy",), 0.01),),
    fields=("id", "image", "question", "answer"),
    headline="accuracy",
    prompt=lambda row: row["question"],
    query=lambda row: row["question"].split("\n", 1)[0],  # options and instructions stand on lines of their own
    gold=lambda row: row["answer"],
    parse=parse,
    is_correct=lambda row, parsed: parsed == right_answer(row),
    measures=measures,
    guesses=guesses,
    unit=lambda row: row["id"],
    labels=lambda row: tuple(LETTERS[: len(options(row))]),
)
PROTOCOLS = protocols(
    PAPER,
    lmms_eval={
        "rule": "question verbatim; upper-case letter in its formats, open answers whole; 16 new tokens",
        "parse": _lmms_parse,
        "is_correct": _same,
        "max_new_tokens": 16,
    },
    cambrian={
        "rule": "question verbatim; first word (of what follows 'answer is') equals the gold answer",
        "parse": lambda row, output: cambrian_word(output),
        "is_correct": _same,
        "max_new_tokens": 512,
    },
)
