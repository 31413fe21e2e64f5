"""RealWorldQA: free questions, some with lettered options inside the question. There is no official scorer.

`paper`: where the gold answer is a letter, the option's letter, else its text; otherwise the whole output must equal
the gold answer after normalisation (case, punctuation, article, number words); it is not enough that it contains it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from agevlm.stats import Measure, ResultKey, share

from .benchmark import Answers, Benchmark, Column, Guesses, Row, Source, among, protocols, table_options
from .harnesses import cambrian_word, lmms_choice
from .parsing import LETTERS, normalize, parse_choice


_ASKED = "Question: "  # how VLMEvalKit's prompt begins
_OPTION = re.compile(r"^[ \t]*([A-J])(?:[.):,][ \t]*|[ \t]+)(\S.*)$", flags=re.MULTILINE)


def options(row: Row) -> list[str]:
    """The options' texts, in order; empty for an open question.

    A gold answer of one letter, and nothing else, makes a choice question, however its list is typed. An option that
    cannot be found is "" and can be chosen by its letter.
    """
    answer = gold(row)
    if len(answer) != 1 or answer not in LETTERS:
        return []
    texts = dict(_OPTION.findall(row["question"]))
    return [texts.get(letter, "").strip() for letter in LETTERS[: LETTERS.index(max(answer, *texts)) + 1]]


def gold(row: Row) -> str:
    """The gold answer, the letter of an option in upper case."""
    answer = row["answer"].strip()
    return answer.upper() if len(answer) == 1 else answer


def parse(row: Row, output: str) -> str | None:
    choices = options(row)
    return parse_choice(output, choices) if choices else normalize(output) or None


def right_answer(row: Row) -> str:
    return gold(row) if options(row) else normalize(row["answer"])


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


def _from_table(row: Row) -> Row:
    """VLMEvalKit has the options in columns and writes them into its prompt."""
    listed = [f"{letter}. {text}\n" for letter, text in zip(LETTERS, table_options(row), strict=False)]
    if not listed:
        return row
    choose = "Please select the correct answer from the options above. \n"
    return {**row, "question": "".join([f"{_ASKED}{row['question']}\nOptions:\n", *listed, choose])}


PAPER = Benchmark(
    name="realworldqa",
    rule=(
        "question verbatim; option letter (VLMEvalKit's and more) or text, open answers by normalised equality "
        "(judged column: judge)"
    ),
    source=Source("xai-org/RealworldQA", None, ("test",), tables=("RealWorldQA.tsv",), from_table=_from_table),
    columns=(Column("RealWorldQA", ("accuracy",), 0.01),),
    fields=("id", "image", "question", "answer"),
    headline="accuracy",
    # Options and instructions stand on lines of their own.
    query=lambda row: row["question"].split("\n", 1)[0].removeprefix(_ASKED),
    gold=gold,
    parse=parse,
    is_correct=lambda row, parsed: parsed == right_answer(row),
    measures=measures,
    guesses=guesses,
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
