"""POPE: yes/no questions about the presence of objects, in three categories of negatives.

An answer that is not read counts as wrong and, for precision and recall, as not "yes". Headline: F1 pooled over all
rows; accuracy stands beside it, and the mean of the categories' F1, which LLaVA's recipe reports.
`false_yes` is the share of "yes" where the answer is no: hallucination proper.
Deviation: under `lmms-eval` the yes-ratio is that of the answers; lmms-eval computes it from the gold answers.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from agevlm.stats import Measure, ResultKey, count, mean, share

from .benchmark import YES_NO, Answers, Benchmark, Column, Row, Source, always, among, protocols
from .harnesses import first_word, pope_official, whole_answer
from .parsing import parse_yes_no


ASK = " Please answer yes or no."
SHORT = "\nAnswer the question using a single word or phrase."


def gold(row: Row) -> str:
    return row["answer"].lower()


def measures(
    rows: Sequence[Row], parsed: Answers, credits: np.ndarray, unread_in_recall: bool = True
) -> dict[ResultKey, Measure]:
    said_yes = np.array([answer == "yes" for answer in parsed], dtype=float)
    unparsed = np.array([answer is None for answer in parsed], dtype=float)
    gold_yes = np.array([gold(row) == "yes" for row in rows], dtype=float)
    absent = 1 - gold_yes
    gold_yes = gold_yes if unread_in_recall else gold_yes * (1 - unparsed)

    def of(chosen: np.ndarray) -> dict[ResultKey, Measure]:
        true_yes = said_yes * gold_yes * chosen
        return {
            ("accuracy",): among(chosen, credits),
            ("precision",): share(true_yes, said_yes * chosen),
            ("recall",): share(true_yes, gold_yes * chosen),
            ("f1",): share(2 * true_yes, (said_yes + gold_yes) * chosen),
            ("yes_ratio",): among(chosen, said_yes),
            ("false_yes",): among(chosen * absent, said_yes),
            ("unparsed",): among(chosen, unparsed),
        }

    # The public files have one category per row, or several joined by commas where duplicates were merged: such a row
    # counts once for each of them, in the numbers over all rows too.
    names = [row["category"].split(",") for row in rows]
    categories = {}
    for name in sorted({name for listed in names for name in listed}):
        chosen = np.array([name in listed for listed in names], dtype=float)
        categories[name] = {("n",): count(chosen), **of(chosen)}
    return {
        **of(np.array([len(listed) for listed in names], dtype=float)),
        ("mean_category_f1",): mean([category["f1",] for category in categories.values()]),
        **{("categories", name, *path): m for name, category in categories.items() for path, m in category.items()},
    }


PAPER = Benchmark(
    name="pope",
    rule="question + ' Please answer yes or no.'; strict yes/no (VLMEvalKit), unread answers are wrong",
    source=Source(
        "lmms-lab/POPE",
        "default",
        ("test",),
        files=tuple(f"coco_pope_{category}.json" for category in ("random", "popular", "adversarial")),
        renamed={"text": "question", "label": "answer"},
        number=lambda row: (row["category"], row["question_id"]),
        from_name=lambda stem: {"category": stem.removeprefix("coco_pope_")},
        tables=("POPE.tsv",),
        from_table=lambda row: {**row, "question": row["question"].removesuffix(ASK)},
    ),
    columns=(Column("POPE", ("f1",)),),
    shown=("f1", "accuracy", "yes_ratio"),
    fields=("id", "image", "question", "answer", "category"),
    headline="f1",
    prompt=lambda row: row["question"] + ASK,
    gold=gold,
    parse=lambda row, output: parse_yes_no(output),
    is_correct=lambda row, parsed: parsed == gold(row),
    measures=measures,
    guesses=lambda rows: always({f"always {word}": word for word in YES_NO}, rows),
    unit=lambda row: row.get("image_source") or row["id"],
    labels=lambda row: YES_NO,
)
PROTOCOLS = protocols(
    PAPER,
    official={
        "rule": "bare question; no if the first sentence has No, no or not, else yes (POPE's evaluate.py)",
        "prompt": lambda row: row["question"],
        "parse": lambda row, output: pope_official(output),
    },
    lmms_eval={
        "rule": "question + single word or phrase; the whole output must be yes or no; unread yes leave the recall",
        "prompt": lambda row: row["question"].strip() + SHORT,
        "parse": lambda row, output: whole_answer(output, YES_NO),
        "measures": partial(measures, unread_in_recall=False),
    },
    cambrian={
        "rule": "question + single word or phrase; first word; headline accuracy",
        "prompt": lambda row: row["question"] + SHORT,
        "parse": lambda row, output: first_word(output, YES_NO),
        "headline": "accuracy",
    },
)
