"""Questions in words, without a picture: the language ability that training should leave.

The rows are scenes in words (`agevlm.data.scenes.build.load_told`), or a file of the same columns, of which `set` and
`kind` may be missing. Where the answer is yes or no, reading is strict; any other answer must be equal but for case,
punctuation and spaces.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from agevlm.stats import Measure, ResultKey, share

from .benchmark import YES_NO, Answers, Benchmark, Guesses, Row, always, among, protocols
from .parsing import parse_yes_no, simplify


def gold(row: Row) -> str:
    return simplify(row["answer"])


def parse(row: Row, output: str) -> str | None:
    return parse_yes_no(output) if gold(row) in YES_NO else simplify(output) or None


def measures(rows: Sequence[Row], parsed: Answers, credits: np.ndarray) -> dict[ResultKey, Measure]:
    """`accuracy`, also apart by `kinds`, and the share of "yes"."""
    kinds = [row.get("kind") for row in rows]
    return {
        ("accuracy",): share(credits),
        ("yes_ratio",): share([answer == "yes" for answer in parsed]),
        **{("kinds", k): among([k == kind for kind in kinds], credits) for k in sorted({k for k in kinds if k})},
    }


def guesses(rows: Sequence[Row]) -> Guesses:
    """The two most frequent answers, each given every time."""
    answers = sorted(map(gold, rows))  # equally frequent ones in alphabetical order
    return always({f"always {answer}": answer for answer, _ in Counter(answers).most_common(2)}, rows)


PAPER = Benchmark(
    name="told",
    rule="question verbatim, without a picture; strict yes/no (VLMEvalKit), other answers by equality",
    fields=("id", "image", "question", "answer"),
    headline="accuracy",
    gold=lambda row: gold(row) if gold(row) in YES_NO else row["answer"],
    parse=parse,
    is_correct=lambda row, parsed: parsed == gold(row),
    measures=measures,
    guesses=guesses,
    unit=lambda row: row.get("set") or row["id"],
    labels=lambda row: YES_NO if gold(row) in YES_NO else (),
)
PROTOCOLS = protocols(PAPER)
