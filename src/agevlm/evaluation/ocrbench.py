"""OCRBench (v1): reading text. Right if a gold answer is contained in the output.

Comparison ignores case and takes line breaks for spaces; handwritten formulas (HME100k) are compared with all spaces
removed and case kept. Headline: `final`, the count of right answers; of 1000 in the public set, 200 in each of the
paper's two categories. No accent or number normalization, as in the official script, which all harnesses follow.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from agevlm.stats import Measure, ResultKey, count, share

from .benchmark import Answers, Benchmark, Column, Guesses, Row, Source, protocols
from .harnesses import fold_width


_FORMULA = "Handwritten Mathematical"
RECOGNITION = ("Regular", "Irregular", "Artistic", "Handwriting", "Digit String", "Non-Semantic")


def golds(row: Row) -> list[str]:
    return [row["answer"]] if isinstance(row["answer"], str) else list(row["answer"])


def _normalize(row: Row, text: str) -> str:
    if row["dataset"] == "HME100k":
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.lower().strip().replace("\n", " ")


def parse(row: Row, output: str) -> str | None:
    """The normalized output; None if it is empty."""
    return _normalize(row, output) or None


def _fold(row: Row, text: str) -> str:
    return text if row["dataset"] == "HME100k" else fold_width(text)


def _contains(fold: Callable[[Row, str], str]) -> Callable[[Row, str | None], bool]:
    def is_correct(row: Row, parsed: str | None) -> bool:
        return parsed is not None and any(_normalize(row, fold(row, answer)) in parsed for answer in golds(row))

    return is_correct


def measures(rows: Sequence[Row], parsed: Answers, credits: np.ndarray) -> dict[ResultKey, Measure]:
    """`final`, `text_recognition` (six categories) and `categories`: counts of right answers; `accuracy`: percent."""
    kinds = [row["question_type"] for row in rows]

    def right(*names: str) -> np.ndarray:
        return credits * np.array([kind in names for kind in kinds], dtype=float)

    recognition = [kind for kind in sorted(set(kinds)) if kind.startswith(RECOGNITION)]
    return {
        ("final",): count(credits),
        ("accuracy",): share(credits),
        ("text_recognition",): count(right(*recognition)),
        **{("categories", kind): count(right(kind)) for kind in sorted(set(kinds))},
    }


def guesses(rows: Sequence[Row]) -> Guesses:
    """The most frequent gold answer, given every time."""
    word = Counter(answer for row in rows for answer in sorted(set(golds(row)))).most_common(1)[0][0]
    return {f"always '{word.strip()}'": ([parse(row, word) for row in rows], None)}


PAPER = Benchmark(
    name="ocrbench",
    rule="question verbatim; a gold answer is contained in the output (official rule)",
    source=Source(
        "echo840/OCRBench",
        None,
        ("test",),
        files=("OCRBench.json",),
        renamed={
            "dataset_name": "dataset",
            "type": "question_type",
            "category": "question_type",
            "answers": "answer",
        },
        tables=("OCRBench.tsv",),
        # VLMEvalKit has no data set's name, and knows formulas by their category
        from_table=lambda row: {"dataset": "HME100k" if row["category"].startswith(_FORMULA) else "", **row},
    ),
    columns=(
        Column("OCRBench scene", ("categories", "Scene Text-centric VQA"), digits=0),
        Column("OCRBench key info.", ("categories", "Key Information Extraction"), digits=0),
    ),
    fields=("id", "image", "dataset", "question", "question_type", "answer"),
    headline="final",
    gold=lambda row: " | ".join(golds(row)),
    parse=parse,
    is_correct=_contains(lambda row, text: text),
    measures=measures,
    guesses=guesses,
    labels=lambda row: (),
)
PROTOCOLS = protocols(
    PAPER,
    official={"max_new_tokens": 100},
    lmms_eval={
        "rule": "question verbatim; containment, full-width ASCII folded except in formulas (HME100k)",
        "parse": lambda row, output: parse(row, _fold(row, output)),
        "is_correct": _contains(_fold),
    },
    cambrian={
        "rule": "question + give the short answer directly; containment",
        "prompt": lambda row: row["question"] + "\nGive the short answer directly.",
    },
)
