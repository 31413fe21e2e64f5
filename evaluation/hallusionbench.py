"""HallusionBench, image rows: statements about an original and an edited figure, and three strictnesses of accuracy.

`aAcc`: over questions. `fAcc`: share of figures all of whose questions are right. `qAcc`: share of questions that are
right on all their figures. Protocol of VLMEvalKit (bare question, strict yes/no, unread is wrong), whose 951 image
rows the paper's numbers fit; the official GPT judge is not used.
"""

from collections import defaultdict
from collections.abc import Sequence

from .benchmark import Metrics, Row, percent
from .parsing import parse_yes_no


NAME = "hallusionbench"
PROTOCOL = "bare question, image rows; strict yes/no (VLMEvalKit), unread answers are wrong"
FIELDS = ("id", "image", "category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer")
# Set and question numbers restart in each subcategory, and one subcategory exists under both categories.
FIGURE = ("category", "subcategory", "set_id", "figure_id")
QUESTION = ("category", "subcategory", "set_id", "question_id")


def prompt(row: Row) -> str:
    return row["question"]


def query(row: Row) -> str:
    return row["question"]


def gold(row: Row) -> str:
    return "yes" if row["gt_answer"] == "1" else "no"


def parse(row: Row, output: str) -> str | None:
    return parse_yes_no(output)


def is_correct(row: Row, parsed: str | None) -> bool:
    return parsed == gold(row)


def score(rows: Sequence[Row], parsed: Sequence[str | None]) -> Metrics:
    """`aAcc`, `fAcc`, `qAcc`, `yes_ratio` (share of answers that say yes) and `unparsed`."""
    figures, questions = defaultdict(list), defaultdict(list)
    for row, answer in zip(rows, parsed, strict=True):
        right = is_correct(row, answer)
        questions[tuple(row[field] for field in QUESTION)].append(right)
        if not (row["category"] == "VS" and row["figure_id"] == "0"):  # text only: there is no figure
            figures[tuple(row[field] for field in FIGURE)].append(right)
    return {
        "headline": "aAcc",
        "n": len(rows),
        "aAcc": percent(sum(map(sum, questions.values())), len(rows)),
        "fAcc": percent(sum(map(all, figures.values())), len(figures)),
        "qAcc": percent(sum(map(all, questions.values())), len(questions)),
        "yes_ratio": percent(sum(answer == "yes" for answer in parsed), len(rows)),
        "unparsed": percent(sum(answer is None for answer in parsed), len(rows)),
    }


def constants(rows: Sequence[Row]) -> dict[str, Metrics]:
    return {f"always {word}": score(rows, [word] * len(rows)) for word in ("yes", "no")}
