"""How the public harnesses read answers, quirks included, so that their gap can be shown (lmms-eval 0.7.3, Cambrian
commit 539ffc3, POPE commit 3df3ba1). The paper's protocol reads by `parsing.py`.
"""

import re
import unicodedata
from collections.abc import Sequence


def pope_official(output: str) -> str:
    """POPE's `evaluate.py`: "no" if the first sentence has one of three words in this very spelling, else "yes", also
    for an empty answer."""
    words = output.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def whole_answer(output: str, known: Sequence[str]) -> str | None:
    """lmms-eval on POPE: the whole output, lower-cased, is one of the known answers. "Yes." is not."""
    text = output.lower().strip()
    return text if text in known else None


def first_word(output: str, known: Sequence[str]) -> str | None:
    """Cambrian on POPE: the first word without trailing ".:,"."""
    words = output.lower().split()
    word = words[0].rstrip(".:,") if words else None
    return word if word in known else None


def _after_answer(output: str) -> str:
    """Cambrian: what follows the last "answer is", "answer is:" or "answer:", lower-cased."""
    text = output.lower().strip()
    for phrase in ("answer is", "answer is:", "answer:"):
        if phrase in text:
            text = text.rsplit(phrase, 1)[1].strip()
    return text


def cambrian_letter(output: str, letters: str) -> str | None:
    """Cambrian on CV-Bench: the first character, whatever word it begins ("bookcase" is B)."""
    text = _after_answer(output).rstrip(".:,").lstrip("(").rstrip(")")
    return text[0].upper() if text and text[0].upper() in letters else None


def cambrian_word(output: str) -> str | None:
    """Cambrian on RealWorldQA: the first word."""
    words = _after_answer(output).rstrip(".").split()
    return words[0] if words else None


def lmms_letter(output: str, letters: str) -> str | None:
    """lmms-eval on CV-Bench: the first letter, whatever word it begins ("The answer is B" is T)."""
    found = re.match(r"[(\s]*([A-Z])", output.strip(), flags=re.IGNORECASE)
    return found[1].upper() if found and found[1].upper() in letters else None


# Its Korean, Chinese and Japanese phrases are left out.
_PHRASES = (
    *(f"{word} {noun} is" for noun in ("answer", "option", "choice") for word in ("the correct", "correct")),
    *(f"{word} {noun} is" for noun in ("answer", "option") for word in ("the best", "best")),
    *("the answer is", "answer is", "the choice is", "choice is", "my answer is", "my choice is"),
    *("i choose", "i select", "i pick"),
)


def lmms_choice(output: str, letters: str = "ABCD") -> str | None:
    """lmms-eval on RealWorldQA: an upper-case letter; formats in order of trust, within one the last in the text."""
    text = output.strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    bare, text = text.strip(), f" {text} "
    found = []
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, letter))
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            place = text.find(letter, start + len(phrase)) if start >= 0 else -1
            if place >= 0:
                found.append((7, place, letter))
        forms = ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"), (2, f"{letter} "))
        found += [(trust, text.rfind(form), letter) for trust, form in forms if form in text]
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    # as its stable sort: of equals the earlier letter
    return max(found, key=lambda item: item[:2])[2] if found else None


def fold_width(text: str) -> str:
    """lmms-eval on OCRBench since 2026-07-30: full-width ASCII signs as ordinary ones."""
    return "".join(unicodedata.normalize("NFKC", sign) if "\uff01" <= sign <= "\uff5e" else sign for sign in text)
