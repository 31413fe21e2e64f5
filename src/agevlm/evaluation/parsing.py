"""Reading a verdict out of free text, shared by the benchmarks. What cannot be read is None, never a guess.

- `parse_yes_no`: VLMEvalKit's strict rule, the likely source of the paper's numbers, quirks included ("Answer:Yes" and
  "**Yes**" are not read).
- `parse_choice`: an option's letter, else an option's own text. It reads every letter that VLMEvalKit reads and that
  cannot be an ordinary word, and more: VLMEvalKit leaves verbose answers to its judge
  (tests/evaluation/test_parsing.py lists the differences).
"""

import re
import unicodedata
from collections.abc import Sequence


LETTERS = "ABCDEFGHIJ"
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS.split())}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
_ARTICLE = re.compile(r"(?<![\w.])(?<!(?i:option) )(?<!(?i:choice) )[AI](?= (?!is\b)\w)")
_SIGNS = re.compile(r"[.()\[\],:;!*#{}]")  # that VLMEvalKit takes for spaces around a letter
_PERIODS_REMOVED = 32  # VLMEvalKit passes re.UNICODE (32) where `re.sub` takes a count


def parse_yes_no(output: str) -> str | None:
    """ "yes" or "no" if exactly one of the two is among the words of `output`, else None."""
    text = cleaned = output.lower()
    delete_all = _DIGIT_COMMA.search(text) is not None
    for sign in _PUNCTUATION:
        touches_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if touches_space or delete_all else " ")
    words = _LONE_PERIOD.sub("", cleaned, count=_PERIODS_REMOVED).split()
    said = {"yes", "no"}.intersection(words)
    return said.pop() if len(said) == 1 else None


def parse_choice(output: str, choices: Sequence[str]) -> str | None:
    """The letter ("A" is the first of `choices`) that `output` chooses, or None.

    In this order: the letter after the last "answer", "answer is" or "answer:"; the only letter in brackets; a letter
    that opens the output, before a punctuation mark or the end; the only upper-case letter, among the last four words;
    the only option whose text occurs as whole words.
    """
    letters, output = LETTERS[: len(choices)], " ".join(output.split())  # long runs of spaces would cost their square
    return (
        _announced_letter(output, letters)
        or _marked_letter(output, letters)
        or _lone_letter(output, letters)
        or option_in_text(output, choices)
    )


def _announced_letter(output: str, letters: str) -> str | None:
    bracketed = rf"[(\[]([{letters}{letters.lower()}])[)\]]"
    bare = rf"(?![AI]\s+[a-z])([{letters}])(?![\w'])"  # "the answer is A cat" speaks of a cat
    found = re.findall(rf"(?i:answer(?:\s+is)?\s*:?)[\s*]*(?:{bracketed}|{bare})", output)
    return "".join(found[-1]).upper() if found else None


def _marked_letter(output: str, letters: str) -> str | None:
    bracketed = {letter.upper() for letter in re.findall(rf"[(\[]([{letters}{letters.lower()}])[)\]]", output)}
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    opening = re.match(rf"[\s*]*([{letters}{letters.lower()}])[\s*]*(?:[.):,](?!\w)|$)", output)
    return opening.group(1).upper() if opening else None


def _lone_letter(output: str, letters: str) -> str | None:
    """VLMEvalKit's rule: its signs are taken out, one letter alone is among the words, and it stands near the end. An
    article and the pronoun "I" are words, no letters."""
    words = _SIGNS.sub(" ", _ARTICLE.sub("-", output)).split()
    found = {word for word in words if word in letters}
    letter = found.pop() if len(found) == 1 else ""
    return letter if letter in words[-4:] and words.index(letter) >= len(words) - 4 else None


def option_in_text(output: str, choices: Sequence[str]) -> str | None:
    """The letter of the only option whose text occurs in `output` as whole words, longer options first ("coffee table"
    hides "table"). Numbers may be written as words where every option is a number."""
    text, options = simplify(output), [simplify(choice) for choice in choices]
    if all(number_value(option) is not None for option in options):
        text = " ".join(number_value(word) or word for word in re.findall(r"[\w.]+", text))
        options = [number_value(option) or option for option in options]
    found = set()
    for index in sorted(range(len(options)), key=lambda i: len(options[i]), reverse=True):
        if not options[index]:
            continue
        text, times = re.subn(rf"(?<![\w.]){re.escape(options[index])}(?!\w|\.\d)", "\0", text)
        if times:
            found.add(LETTERS[index])
    return found.pop() if len(found) == 1 else None


def number_value(text: str) -> str | None:
    """Digits of a number in digits or words ("two" -> "2"), else None."""
    text = NUMBER_WORDS.get(text, text)
    return text if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text) else None


def normalize(text: str) -> str:
    """`simplify`, without an article in front and with a number word in digits."""
    text = re.sub(r"^(?:the answer is |a |an |the )+", "", simplify(text))
    return number_value(text) or text


def simplify(text: str) -> str:
    """Lower case, single spaces, no punctuation or quotes around it, decimal digits of any script as 0 to 9."""
    text = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text.lower())
    return " ".join(text.split()).strip(" .,;:!?\"'*")
