"""The paper's claims, each decided from the numbers of a reproduction.

A claim that one row is above another holds where the paired interval of the difference over questions excludes 0 in
its favour *and* every seed agrees in sign; else it does not hold, and its sentence says whether the difference is
reversed or none can be told. It is undecided with fewer than two seeds, and where both rows answer no better than
blindly: what cannot answer cannot answer better. Table 2's claims are made where the paper's own table makes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from agevlm.evaluation import leaderboard
from agevlm.reproduction.results import Claim
from agevlm.reproduction.scores import MASS, Scores


BASELINE, GUIDED, GUIDED_TWICE, TWIN = "ca-baseline", "agevlm", "agevlm-lm", "twin"
# Our number -> its column in the paper's Table 2 and what makes percent of it; OCRBench is its scene-centric part, a
# count out of 200. Our twin stands for ConvLLaVA: one ConvNeXt tower, visual tokens in front of the text.
_COLUMNS = {
    "POPE F1": ("POPE", 1),
    "CV-Bench 2D": ("CV-Bench 2D", 100),
    "CV-Bench 3D": ("CV-Bench 3D", 100),
    "RealWorldQA": ("RealWorldQA", 100),
    "Hallusion aAcc": ("HallusionBench aAcc", 1),
    "Hallusion fAcc": ("fAcc", 1),
    "Hallusion qAcc": ("qAcc", 1),
    "OCRBench": ("OCRBench scene", 0.5),
}
_ROWS = {BASELINE: "CA-Baseline", GUIDED: "AGE-VLM", GUIDED_TWICE: "AGE-VLM-LM", TWIN: "ConvLLaVA"}
_PLACES = leaderboard.TABLE_2
PAPER = {
    number: {row: factor * leaderboard.PAPER[name][_PLACES.index(column)] for row, name in _ROWS.items()}
    for number, (column, factor) in _COLUMNS.items()
}
_SHORT = {BASELINE: "CA-baseline", GUIDED: "AGE-VLM", GUIDED_TWICE: "AGE-VLM-LM", TWIN: "the concatenating twin"}

Files = Mapping[str, Sequence[Any]]  # row -> what one file of each seed says


def decide(difference: Mapping[str, Any]) -> bool | None:
    """Whether `second` is above `first`: see the top of this file."""
    if len(difference["seeds"]) < 2:
        return None
    return difference["interval"][0] > 0 and all(value > 0 for value in difference["seeds"].values())


def compared(title: str, what: str, difference: Mapping[str, Any] | None, is_blind: bool = False) -> Claim:
    """A claim that one row is above another in one number.

    Args:
        difference: see `Scores.difference`; None where a row is missing.
        is_blind: neither row is above blind answers.
    """
    if difference is None:
        return Claim(title, None, f"Not run: {what} needs rows that are not there.")
    low, high = difference["interval"]
    seeds = ", ".join(f"{value:+.1f}" for value in difference["seeds"].values())
    sentence = (
        f"{what}: {difference['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] over questions; seeds {seeds}."
    )
    if is_blind:
        return Claim(title, None, f"{sentence} Neither is above blind answers, so this decides nothing.")
    holds = decide(difference)
    if holds is False:
        sentence += " The difference is reversed." if high < 0 else " No difference can be told."
    return Claim(title, holds, sentence)


def claims(scores: Scores, similarity: Files, padding: Files) -> list[Claim]:
    """The paper's claims, in its order."""
    return [
        _apart(similarity),
        _above(scores, BASELINE, GUIDED, MASS, "Section 3.2.2: guidance moves the cross-attention onto the object"),
        _above(scores, GUIDED, GUIDED_TWICE, MASS, "Section 3.2.3: guiding stage 4 too moves it further"),
        *_table_2(scores, BASELINE),
        *_table_2(scores, TWIN),
        _looks_at_padding(padding),
        _padding(padding),
    ]


def _above(scores: Scores, first: str, second: str, number: str, title: str) -> Claim:
    difference = scores.difference(first, second, number)
    is_blind = difference is not None and not any(scores.is_above_blind(row, number) for row in (first, second))
    return compared(title, f"{_SHORT[second]} over {_SHORT[first]}, {number}", difference, is_blind)


def _table_2(scores: Scores, rival: str) -> list[Claim]:
    """AGE-VLM above a rival, in every number where the paper's Table 2 has it above, and in POPE's accuracy: F1 near
    chance tells how often a model says yes."""
    title = f"Table 2's point, in POPE accuracy: AGE-VLM above {_SHORT[rival]} (the paper gives F1)"
    made = [_above(scores, rival, GUIDED, "POPE accuracy", title)]
    for number, paper in PAPER.items():
        if paper[GUIDED] > paper[rival]:
            theirs = f"paper: {paper[GUIDED]:.1f} against {paper[rival]:.1f}"
            title = f"Table 2, {number}: AGE-VLM above {_SHORT[rival]} ({theirs})"
            made.append(_above(scores, rival, GUIDED, number, title))
    return made


def _apart(similarity: Files) -> Claim:
    title = "Figure 2: final hidden states of a concatenating model do not tell matched pairs from mismatched ones"
    if not similarity.get(TWIN):
        return Claim(title, None, "Not run: it needs the concatenating twin.")
    spans = [entry["headline"]["auroc_interval"] for entry in similarity[TWIN]]
    sentence = f"AUROC of the twin's final layer, one per seed: {_aurocs(similarity[TWIN])}; 0.5 tells nothing apart."
    if similarity.get(GUIDED):
        sentence += f" AGE-VLM's last cross block: {_aurocs(similarity[GUIDED])}."
    holds = None if len(spans) < 2 else all(low <= 0.5 <= high for low, high in spans)
    if any(high < 0.5 for _, high in spans):
        sentence += " An interval below 0.5: there the mismatched pairs are the closer ones."
    return Claim(title, holds, sentence)


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
        return Claim(title, None, "Not run: it needs the CA-baseline.")
    sentence = (
        f"The CA-baseline's attention on unmarked padding is {min(found):.2f} to {max(found):.2f} times that of an "
        "even spread, lowest to highest seed."
    )
    return Claim(title, None if len(found) < 2 else min(found) > 1, sentence)


def _padding(padding: Files) -> Claim:
    """`pad`: what the models do where nobody tells them what is padding."""
    title = "Appendix C: guidance takes attention off padding"
    low, high = (_enrichment(padding, name) for name in (GUIDED, BASELINE))
    if not low or not high:
        return Claim(title, None, "Not run: it needs AGE-VLM and CA-baseline.")
    sentence = (
        f"Attention on unmarked padding over its share of the area, lowest to highest seed: AGE-VLM {min(low):.2f} to "
        f"{max(low):.2f}, CA-baseline {min(high):.2f} to {max(high):.2f}; 1 is indifference."
    )
    return Claim(title, None if min(len(low), len(high)) < 2 else max(low) < min(high), sentence)
