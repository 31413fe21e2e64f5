"""HallusionBench: statements about an original and an edited figure, and three strictnesses of accuracy.

`aAcc`: over questions. `fAcc`: share of figures all of whose questions are right. `qAcc`: share of questions that are
right on all their figures. `average`: the mean of the three, which leaderboards print. `paper`: VLMEvalKit's reading
of the 951 rows with a picture, which the paper's numbers fit. `official` (all 1129 rows) and `lmms-eval` (951) are
scored by a judge alone, who compares the answer with the row's `gt_answer_details`; saying nothing definite
("unclear") is right where a picture is needed and none is there. Their rule-based columns are those of `paper`.
Deviation: a judge's nonsense is "unjudged" and wrong; officially it is "unclear".
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agevlm.stats import Measure, ResultKey, all_right, mean, share

from .benchmark import RIGHT, YES_NO, Answers, Benchmark, Column, Row, Source, always, among, protocols
from .parsing import parse_yes_no


# Set and question numbers restart in each subcategory, and one subcategory exists under both categories.
_SET = ("category", "subcategory", "set_id")


def gold(row: Row) -> str:
    return {"1": "yes", "0": "no"}.get(str(row["gt_answer"]), str(row["gt_answer"]))


def without_figure(row: Row) -> bool:
    """Whether the row is asked as text alone: a supplement question without its figure."""
    return row["category"] == "VS" and str(row["figure_id"]) == "0"


def _key(row: Row, field: str) -> tuple:
    return (*(row[name] for name in _SET), row[field])


def measures(rows: Sequence[Row], parsed: Answers, credits: np.ndarray) -> dict[ResultKey, Measure]:
    """`aAcc`, `fAcc`, `qAcc` and their `average`, also of each of `categories`; `aAcc` of `subcategories`."""
    kinds = [f"{row['category']} {row['subcategory']}" for row in rows]

    def of(category: str | None) -> dict[ResultKey, Measure]:
        chosen = [category in (None, row["category"]) for row in rows]
        pairs = list(zip(rows, chosen, strict=True))
        figures = [_key(row, "figure_id") if here and not without_figure(row) else None for row, here in pairs]
        questions = [_key(row, "question_id") if here else None for row, here in pairs]
        three: dict[ResultKey, Measure] = {
            ("aAcc",): among(chosen, credits),
            ("fAcc",): all_right(figures, credits),
            ("qAcc",): all_right(questions, credits),
        }
        return {**three, ("average",): mean(list(three.values()))}

    categories = sorted({row["category"] for row in rows})
    return {
        **of(None),
        ("yes_ratio",): share([answer == "yes" for answer in parsed]),
        **{("categories", name, *path): measure for name in categories for path, measure in of(name).items()},
        **{("subcategories", kind): among([kind == other for other in kinds], credits) for kind in sorted(set(kinds))},
    }


def _from_table(row: Row) -> Row:
    """VLMEvalKit has the numbers of set, figure and question in its index, and both categories in one column."""
    category, _, subcategory = row["l2-category"].partition("_")
    numbers = dict(zip(("set_id", "figure_id", "question_id"), row["index"].split("_")[3:6], strict=False))
    answer = row["answer"].strip().lower()
    gt_answer = {"yes": "1", "no": "0"}.get(answer, answer)
    return {**numbers, **row, "category": category, "subcategory": subcategory, "gt_answer": gt_answer}


SOURCE = Source(
    "lmms-lab/HallusionBench",
    None,
    ("image",),
    files=("HallusionBench.json",),
    tables=("HallusionBench.tsv",),
    from_table=_from_table,
    number=lambda row: tuple(row[name] for name in ("category", "subcategory", "set_id", "figure_id", "question_id")),
)
PAPER = Benchmark(
    name="hallusionbench",
    rule="bare question, rows with a picture; strict yes/no (VLMEvalKit), unread answers are wrong",
    source=SOURCE,
    columns=(Column("HallusionBench aAcc", ("aAcc",)), Column("fAcc", ("fAcc",)), Column("qAcc", ("qAcc",))),
    fields=("id", "image", "category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer"),
    headline="aAcc",
    gold=gold,
    parse=lambda row, output: parse_yes_no(output),
    is_correct=lambda row, parsed: parsed == gold(row),
    measures=measures,
    guesses=lambda rows: always({f"always {word}": word for word in YES_NO}, rows),
    unit=lambda row: tuple(row[name] for name in _SET),
    labels=lambda row: YES_NO,
    uses=lambda row: not without_figure(row),
)
_JUDGED = {
    "rule": "bare question, rows with a picture; a judge compares with gt_answer_details",
    "fields": (*PAPER.fields, "gt_answer_details"),
    "gold": lambda row: row["gt_answer_details"],
    "labels": lambda row: (),
    "credit": lambda row, label: float(label == RIGHT or (label == "unclear" and without_figure(row))),
    "judged_only": True,
}
PROTOCOLS = protocols(
    PAPER,
    official={
        **_JUDGED,
        "rule": "bare question, all rows; a judge compares with gt_answer_details",
        "source": replace(SOURCE, splits=("image", "non_image")),
        "uses": lambda row: True,
    },
    lmms_eval=_JUDGED,
)
