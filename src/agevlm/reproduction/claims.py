"""The paper's claims, each decided from the numbers of a reproduction.

A claim that one row is above another holds where the paired interval of the difference, over questions and seeds, lies
above 0; else it does not hold, and its sentence says whether the difference is reversed or unclear. It is undecided
with fewer than two seeds, and where both rows answer no better than blindly. A claim whose rows are missing was not
run. Table 2's claims are made where the paper's own table makes them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agevlm.stats import interval

from .matrix import BASELINE, GUIDED, GUIDED_TWICE, PHRASES, PHRASES_TWICE, TWIN
from .scores import ACCURACY, FALSE_YES, MASS, TABLE_2, Scores


HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
HIGHER, LOWER, UNCLEAR, ONE_SEED = "higher", "lower", "no clear difference", "one seed"
_SHORT = {
    BASELINE: "CA-baseline",
    GUIDED: "AGE-VLM",
    GUIDED_TWICE: "AGE-VLM-LM",
    TWIN: "the concatenating twin",
    PHRASES: "AGE-VLM phrase by phrase",
    PHRASES_TWICE: "AGE-VLM-LM phrase by phrase",
}

Files = Mapping[str, Sequence[Any]]  # row -> what one file of each seed says


@dataclass(frozen=True)
class Claim:
    """A statement, its verdict (`HOLDS`, `FAILS`, `UNDECIDED` or `NOT_RUN`), and the numbers behind it."""

    title: str
    verdict: str
    sentence: str


def claims(scores: Scores, similarity: Files, padding: Files) -> list[Claim]:
    """The promises of the method first, then the paper's claims in its order."""
    return [
        against(scores, BASELINE, GUIDED, MASS, "Looks where it should: attention inside the mask is above unguided"),
        _uses_the_picture(scores),
        # The paper gives F1, which near chance tells how often a model says yes
        against(scores, BASELINE, GUIDED, ACCURACY, "Guided answers are better than unguided ones: presence"),
        # Whoever always says no hallucinates nothing, so presence must be above blind answers
        against(
            scores,
            BASELINE,
            GUIDED,
            FALSE_YES,
            "Guidance lowers hallucination: fewer answers yes about absent things",
            wanted=LOWER,
            able=ACCURACY,
        ),
        *_by_phrase(scores),
        against(scores, GUIDED, GUIDED_TWICE, MASS, "Section 3.2.3: guiding stage 4 too moves the attention further"),
        against(scores, TWIN, GUIDED, ACCURACY, "Better than the concatenating twin: presence"),
        *_table_2(scores, BASELINE),
        *_table_2(scores, TWIN),
        _apart(similarity),
        _looks_at_padding(padding),
        _padding(padding),
    ]


def summary(made: Sequence[Claim]) -> str:
    """One sentence on how many claims hold."""
    counts = Counter(claim.verdict for claim in made)
    said = {HOLDS: "hold", FAILS: "do not hold", UNDECIDED: "are undecided", NOT_RUN: "were not run"}
    return f"Of {len(made)} claims, {', '.join(f'{counts[name]} {words}' for name, words in said.items())}."


def reading(difference: Mapping[str, Any]) -> str:
    """The verdict of a difference of `Scores.difference`: `HIGHER`, `LOWER`, `UNCLEAR` or `ONE_SEED`."""
    return ONE_SEED if len(difference["seeds"]) < 2 else _direction(difference)


def _direction(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    if low > 0:
        return HIGHER
    return LOWER if high < 0 else UNCLEAR


def difference_text(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    seeds = ", ".join(f"{value:+.1f}" for value in difference["seeds"].values())
    return f"{difference['difference']:+.1f} [{low:+.1f}, {high:+.1f}] ({seeds})"


def against(
    scores: Scores, first: str, second: str, number: str, title: str, wanted: str = HIGHER, able: str | None = None
) -> Claim:
    """The claim that row `second` is above row `first` in one number, or below it (`wanted=LOWER`).

    Args:
        able: number in which one of both must be above blind answers; default: the same one.
    """
    difference = scores.difference(first, second, number)
    if difference is None:
        return _not_run(title, first, second)
    what = f"{_SHORT[second]} minus {_SHORT[first]}, {number}: {difference_text(difference)} points"
    if not any(scores.is_above_blind(row, able or number) for row in (first, second)):
        return Claim(title, UNDECIDED, f"{what}. Neither is above blind answers, so this decides nothing.")
    found = _direction(difference)
    if reading(difference) == ONE_SEED:
        return Claim(title, UNDECIDED, f"{what}: {found} for this seed. It takes two to decide (--seeds 0 1).")
    return Claim(title, HOLDS if found == wanted else FAILS, f"{what}: {found}.")


def _not_run(title: str, *rows: str) -> Claim:
    return Claim(title, NOT_RUN, f"It needs {' and '.join(_SHORT[row] for row in rows)}.")


def _verdict(holds: bool, *seeds: int) -> str:
    """Undecided where any of the numbers of seeds is below two."""
    if min(seeds, default=2) < 2:
        return UNDECIDED
    return HOLDS if holds else FAILS


def _by_phrase(scores: Scores) -> Iterator[Claim]:
    """Beyond the paper: a mask for each phrase of a text."""
    pairs = ((BASELINE, PHRASES_TWICE), (GUIDED, PHRASES_TWICE), (GUIDED_TWICE, PHRASES_TWICE), (GUIDED, PHRASES))
    for rival, row in pairs:
        title = f"Beyond the paper: {_SHORT[row]} answers better than {_SHORT[rival]}: presence"
        yield against(scores, rival, row, ACCURACY, title)
        title = f"Beyond the paper: {_SHORT[row]} hallucinates less than {_SHORT[rival]}"
        yield against(scores, rival, row, FALSE_YES, title, wanted=LOWER, able=ACCURACY)


def _uses_the_picture(scores: Scores) -> Claim:
    """The interval of every seed must lie above the best constant answer."""
    title = "Answers above every constant answer: presence"
    number = scores.numbers.get(GUIDED, {}).get(ACCURACY)
    best = scores.best_blind(ACCURACY)
    if number is None or best is None:
        return _not_run(title, GUIDED)
    weakest = min(number.seeds.values(), key=lambda measure: measure.value())
    lows = [interval(measure, number.units)[0] for measure in number.seeds.values()]
    low, high = interval(weakest, number.units)
    sentence = (
        f"The weakest seed of {_SHORT[GUIDED]} reaches {weakest.value():.1f} % [{low:.1f}, {high:.1f}]; the best "
        f"constant answer ({best[0]}) {best[1]:.1f} %."
    )
    return Claim(title, _verdict(min(lows) > best[1]), sentence)


def _table_2(scores: Scores, rival: str) -> list[Claim]:
    """AGE-VLM above a rival, in every number where the paper's Table 2 has it above."""
    made = []
    for answer in TABLE_2:
        paper = answer.paper
        if paper and paper[GUIDED] > paper[rival]:
            theirs = f"paper: {paper[GUIDED]:.1f} against {paper[rival]:.1f}"
            title = f"Table 2, {answer.title}: AGE-VLM above {_SHORT[rival]} ({theirs})"
            made.append(against(scores, rival, GUIDED, answer.title, title))
    return made


def _apart(similarity: Files) -> Claim:
    """Stronger than the paper, which names no threshold of overlap."""
    title = "Figure 2, stronger than the paper: nothing separates a concatenating model's matched and mismatched pairs"
    if not similarity.get(TWIN):
        return _not_run(title, TWIN)
    spans = [entry["headline"]["auroc_interval"] for entry in similarity[TWIN]]
    overlaps = [entry["headline"]["overlap"] for entry in similarity[TWIN]]
    sentence = (
        "The paper says that their similarities overlap, without a threshold, and separate in part for ConvLLaVA. "
        f"The twin's final layer: overlap {min(overlaps):.2f} to {max(overlaps):.2f}, lowest to highest seed; AUROC, "
        f"one per seed: {_aurocs(similarity[TWIN])}; 0.5 tells nothing apart."
    )
    if similarity.get(GUIDED):
        sentence += f" AGE-VLM's last cross block: {_aurocs(similarity[GUIDED])}."
    if any(high < 0.5 for _, high in spans):
        sentence += " An interval below 0.5: there the mismatched pairs are the closer ones."
    holds = all(low <= 0.5 <= high for low, high in spans)
    return Claim(title, _verdict(holds, len(spans)), sentence)


def _aurocs(entries: Sequence[Any]) -> str:
    heads = [entry["headline"] for entry in entries]
    return ", ".join("{:.3f} [{:.3f}, {:.3f}]".format(head["auroc"], *head["auroc_interval"]) for head in heads)


def _enrichment(padding: Files, name: str) -> list[float]:
    """Of unmarked padding, per seed."""
    return [entry["variants"]["pad"]["enrichment"] for entry in padding.get(name, [])]


def _looks_at_padding(padding: Files) -> Claim:
    title = "Appendix C: without guidance, attention goes to padding"
    found = _enrichment(padding, BASELINE)
    if not found:
        return _not_run(title, BASELINE)
    sentence = (
        f"The CA-baseline's attention on unmarked padding is {min(found):.2f} to {max(found):.2f} times that of an "
        "even spread, lowest to highest seed."
    )
    return Claim(title, _verdict(min(found) > 1, len(found)), sentence)


def _padding(padding: Files) -> Claim:
    """Of `pad`, where the models do not know which cells are padding."""
    title = "Appendix C: guidance takes attention off padding"
    low, high = (_enrichment(padding, name) for name in (GUIDED, BASELINE))
    if not low or not high:
        return _not_run(title, GUIDED, BASELINE)
    sentence = (
        f"Attention on unmarked padding over its share of the area, lowest to highest seed: AGE-VLM {min(low):.2f} to "
        f"{max(low):.2f}, CA-baseline {min(high):.2f} to {max(high):.2f}; 1 is indifference."
    )
    return Claim(title, _verdict(max(low) < min(high), len(low), len(high)), sentence)
