"""Own questions about own pictures: yes or no, a choice, an exact answer, or one that the output must contain.

A row has the columns of `own_rows.FEATURES`. A question is asked as it is. Behind one of yes or no stand POPE's words,
unless it has them; options without letters in the question are listed below it. Reading: yes or no strictly; an
option's letter, else its text; `exact` is equality but for case, punctuation, article and number words; `contains`
wants a right answer as whole words anywhere in the output.

A row without `kind` is a choice if it has options, a question of yes or no if it is answered so, else `contains`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from agevlm.stats import Measure, ResultKey, share

from . import realworldqa
from .benchmark import YES_NO, Answers, Benchmark, Guesses, Row, among, protocols
from .parsing import LETTERS, normalize, option_in_text, parse_choice, parse_yes_no, simplify
from .pope import ASK


KINDS = ("yes-no", "choice", "exact", "contains")
LISTED = "\nAnswer with the option's letter from the given choices directly."  # LLaVA's words
_SAID = re.compile(r"(yes|no)(?:[.,;:!]|$)")
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Chinese, ...


def lettered(question: str) -> list[str]:
    """The options that a question lists on lines of their own ("A. red"), none where one is missing."""
    options = realworldqa.options({"question": question, "answer": "A"})
    return options if len(options) > 1 and all(options) else []


def guess_kind(answers: Sequence[str], options: Sequence[str]) -> str:
    if options:
        return "choice"
    return "yes-no" if all(_SAID.match(simplify(answer)) for answer in answers) else "contains"


def right_answers(kind: str, answers: Sequence[str], options: Sequence[str]) -> list[str]:
    """The answers as `parse` gives them: yes or no, a letter, a normalized text; as they are for `contains`.

    Raises:
        ValueError: an unknown kind, an answer that is none of its kind, or right answers that leave no wrong one.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; use {', '.join(KINDS)}")
    if kind == "choice" and not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a choice among {len(options)} options; give 2 to {len(LETTERS)} in options")
    right = [_right_answer(kind, answer, options) for answer in answers]
    if len(set(right)) == {"yes-no": 2, "choice": len(options)}.get(kind):
        raise ValueError(f"answer is {list(answers)}, all that can be said, so that none is wrong; give the right one")
    return right


def _right_answer(kind: str, answer: str, options: Sequence[str]) -> str:
    if kind == "yes-no":
        found = {match[1] for match in [_SAID.match(simplify(answer))] if match}
    elif kind == "choice":
        letter = answer.strip("(). ").upper()
        found = {name for name, text in zip(LETTERS, options, strict=False)
                 if name == letter or simplify(text) == simplify(answer)}  # fmt: skip
    else:
        found = {answer if kind == "contains" else normalize(answer)} if normalize(answer) else set()
    if len(found) != 1:
        wanted = {"yes-no": "yes or no", "choice": f"one of the options {list(options)}, or its letter"}
        raise ValueError(f"answer is {answer!r}, expected {wanted.get(kind, 'a word or more')}")
    return found.pop()


def prompt(row: Row) -> str:
    if row["kind"] == "yes-no" and "yes or no" not in row["question"].lower():
        return row["question"] + ASK
    if not row["options"] or lettered(row["question"]):
        return row["question"]
    lines = [f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["options"], strict=False)]
    return "".join([row["question"], *lines, LISTED])


def words(question: str) -> str:
    """What of a question says what to look at: not the options and instructions below it or behind it."""
    return question.split("\n", 1)[0].removesuffix(ASK)


def parse(row: Row, output: str) -> str | None:
    if row["kind"] == "yes-no":
        return parse_yes_no(output)
    if row["kind"] == "choice":
        return parse_choice(output, row["options"])
    return (normalize(output) if row["kind"] == "exact" else output.strip()) or None


def is_correct(row: Row, parsed: str | None) -> bool:
    if parsed is None or row["kind"] != "contains":
        return parsed in row["answers"]
    return any(_contains(parsed, answer) for answer in row["answers"])


def _contains(text: str, answer: str) -> bool:
    if _NO_SPACES.search(answer):  # no spaces between words
        return simplify(answer) in simplify(text)
    return option_in_text(text, [answer]) is not None


def measures(rows: Sequence[Row], parsed: Answers, credits: np.ndarray) -> dict[ResultKey, Measure]:
    """`accuracy`, also of each of `kinds` and `categories` where there are several; of questions of yes or no also the
    share of "yes", and `false_yes`, that among those answered no."""
    result: dict[ResultKey, Measure] = {("accuracy",): share(credits)}
    asked = np.array([row["kind"] == "yes-no" for row in rows], dtype=float)
    if asked.any():
        said, absent = ([answer == "yes" for answer in parsed], [row["answers"] == ["no"] for row in rows])
        result |= {("yes_ratio",): among(asked, said), ("false_yes",): among(asked * absent, said)}
    for field, title in (("kind", "kinds"), ("category", "categories")):
        names = sorted({row[field] for row in rows})
        for name in names if len(names) > 1 else ():
            result[title, name or "(none)"] = among([row[field] == name for row in rows], credits)
    return result


def guesses(rows: Sequence[Row]) -> Guesses:
    """Two constant answers: to each kind of question its most frequent right answer, and the next one."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    counts = {
        kind: Counter(sorted(answer for row in rows if row["kind"] == kind for answer in row["answers"])).most_common(
            2
        )
        for kind in kinds
    }
    result: Guesses = {}
    for place in (0, -1):
        said = {kind: found[place][0] for kind, found in counts.items()}
        result[f"always {' / '.join(map(repr, said.values()))}"] = [said[row["kind"]] for row in rows], None
    return result


def note(rows: Iterable[Row]) -> str:
    """Says which kinds were guessed."""
    found = Counter(row["kind"] for row in rows if row["guessed"])
    told = ", ".join(f"{found[kind]} {kind}" for kind in KINDS if found[kind])
    return f"Without `kind`, guessed from the answers: {told}." if told else ""


PAPER = Benchmark(
    name="own",
    rule=(
        "question, ' Please answer yes or no.' behind yes-no, options listed; strict yes/no (VLMEvalKit), option "
        "letter or text, `exact` by normalised equality, `contains` as whole words"
    ),
    fields=("id", "image", "question", "answers", "kind", "options", "category"),
    headline="accuracy",
    prompt=prompt,
    query=lambda row: words(row["question"]),
    gold=lambda row: " or ".join(row["answers"]),
    parse=parse,
    is_correct=is_correct,
    measures=measures,
    guesses=guesses,
    unit=lambda row: row["picture"],
    labels=lambda row: (
        YES_NO if row["kind"] == "yes-no" else tuple(LETTERS[: len(row["options"])]) if row["kind"] == "choice" else ()
    ),
    note=note,
)
PROTOCOLS = protocols(PAPER)
