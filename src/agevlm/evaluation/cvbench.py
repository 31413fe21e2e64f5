"""CV-Bench: multiple-choice questions on counting, spatial relation, depth and distance.

`paper`: the row's own `prompt` (question and options), as in VLMEvalKit; option letter, else option text; the rest is
wrong unless a judge reads it (the judged column). `official` is Cambrian, whose authors made the benchmark. Headline:
`overall`, the card's (2D + 3D) / 2 with each side averaged over its sources, where a set has both sides; `accuracy` is
the plain mean over rows, which lmms-eval reports.
"""

from collections.abc import Sequence

import numpy as np

from agevlm.stats import Measure, ResultKey, mean, share

from .benchmark import Answers, Benchmark, Column, Guesses, Row, Source, always, among, protocols, table_options
from .harnesses import cambrian_letter, lmms_letter
from .parsing import LETTERS, parse_choice


def gold(row: Row) -> str:
    return row["answer"].strip("() ")


def letters(row: Row) -> str:
    return LETTERS[: len(row["choices"])]


def measures(rows: Sequence[Row], parsed: Answers, credits: np.ndarray) -> dict[ResultKey, Measure]:
    """`accuracy` over all rows, of each of `tasks` and `sources`, `2D` and `3D` where present, `overall`."""

    def accuracy(**wanted: str) -> Measure:
        return among([all(row[field] == value for field, value in wanted.items()) for row in rows], credits)

    def values(field: str, **wanted: str) -> list[str]:
        return sorted({row[field] for row in rows if all(row[name] == value for name, value in wanted.items())})

    sides = {
        side: mean([accuracy(type=side, source=source) for source in values("source", type=side)])
        for side in values("type")
    }
    return {
        ("accuracy",): share(credits),
        **{("tasks", task): accuracy(task=task) for task in values("task")},
        **{("sources", source): accuracy(source=source) for source in values("source")},
        **{(side,): measure for side, measure in sides.items()},
        ("overall",): mean(list(sides.values())),
    }


def guesses(rows: Sequence[Row]) -> Guesses:
    """Each letter as a constant answer, and `chance`: the expected score of a uniformly drawn option."""
    known = LETTERS[: max(len(row["choices"]) for row in rows)]
    chance = [""] * len(rows), [1 / len(row["choices"]) for row in rows]
    return {**always({f"always ({letter})": letter for letter in known}, rows), "chance": chance}


def _lmms_prompt(row: Row) -> str:
    listed = ", ".join(letters(row))
    note = f"Note: You only need to respond with {listed} without providing any additional information."
    return f"{note}\n\n{row['prompt']}"


def _from_table(row: Row) -> Row:
    """VLMEvalKit calls the side `split` and may have the options in columns."""
    choices = table_options(row)
    side = {"type": row["split"]} if "split" in row else {}
    task = {"task": row["category"]} if "category" in row else {}
    return {**side, **task, **({"choices": choices} if choices else {}), **row}


PAPER = Benchmark(
    name="cvbench",
    rule=(
        "prompt column verbatim; option letter (VLMEvalKit's and more), else option text, unread answers are wrong "
        "(judged column: judge)"
    ),
    source=Source(
        "nyu-visionx/CV-Bench",
        None,
        ("test",),
        number=lambda row: (row["idx"],),
        tables=("CV-Bench-2D.tsv", "CV-Bench-3D.tsv"),
        from_table=_from_table,
    ),
    columns=(Column("CV-Bench 2D", ("2D",), 0.01), Column("CV-Bench 3D", ("3D",), 0.01)),
    fields=("id", "image", "type", "task", "question", "choices", "answer", "prompt", "source"),
    headline="overall",
    prompt=lambda row: row["prompt"],
    gold=gold,
    parse=lambda row, output: parse_choice(output, row["choices"]),
    is_correct=lambda row, parsed: parsed == gold(row),
    measures=measures,
    guesses=guesses,
    labels=lambda row: tuple(letters(row)),
)
_CAMBRIAN = {
    "rule": "prompt + answer with the letter directly; first character (of what follows 'answer is')",
    "prompt": lambda row: row["prompt"] + "\nAnswer with the option's letter from the given choices directly.",
    "parse": lambda row, output: cambrian_letter(output, letters(row)),
}
PROTOCOLS = protocols(
    PAPER,
    official=_CAMBRIAN,
    lmms_eval={
        "rule": "note + prompt; first letter of the output; headline is the plain mean",
        "prompt": _lmms_prompt,
        "parse": lambda row, output: lmms_letter(output, letters(row)),
        "headline": "accuracy",
        "max_new_tokens": 16,
    },
    cambrian=_CAMBRIAN,
)
