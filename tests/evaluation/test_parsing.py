"""Parsers: the known verdicts of the public harnesses, and properties that hold for any text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agevlm.evaluation.parsing import LETTERS, NUMBER_WORDS, parse_choice, parse_yes_no


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("NO!", "no"),
        ("No, there is no cup in the image.", "no"),
        ("There is no person visible in the image.", "no"),
        ("Yes, there is an apple.", "yes"),
        # what VLMEvalKit cannot read, and therefore neither do we
        ("The image does not contain a chair.", None),
        ("Yes, there is an apple. There are no other fruits.", None),
        ("Answer:Yes", None),
        ("**Yes**", None),
        ("No:", None),
        ("Yes,it is, as", None),
        ("", None),
        ("yes no", None),
        ("nothing, yesterday", None),
        ("a. " * 31 + "yes.", "yes"),
        ("a. " * 32 + "yes.", None),
    ],
)
def test_yes_no_verdicts(output, expected):
    assert parse_yes_no(output) == expected


@given(st.sampled_from(["yes", "no"]), st.lists(st.sampled_from(["there", "is", "an", "apple", "in", "it"])))
def test_yes_no_finds_the_word_among_others(word, others):
    middle = len(others) // 2
    assert parse_yes_no(" ".join([*others[:middle], word.capitalize(), *others[middle:]])) == word


@given(st.text())
def test_yes_no_ignores_case(text):
    assert parse_yes_no(text) == parse_yes_no(text.lower())


NUMBERS = ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("output", "choices", "expected"),
    [
        ("(B)", NUMBERS, "B"),
        ("B", NUMBERS, "B"),
        ("b", NUMBERS, "B"),
        ("B.", NUMBERS, "B"),
        ("**C**", NUMBERS, "C"),
        ("B) 1", NUMBERS, "B"),
        ("D: 3", NUMBERS, "D"),
        ("The correct answer is (B) 1.", NUMBERS, "B"),
        ("The correct answer is (B) 1. The image shows one lamp.", NUMBERS, "B"),
        ("Answer: C", NUMBERS, "C"),
        ("It is (A) or (B). The answer is B.", NUMBERS, "B"),
        ("(A) or (B)", NUMBERS, None),
        ("three", NUMBERS, "D"),
        ("There are 3 lamps.", NUMBERS, "D"),
        ("13", NUMBERS, None),
        ("3.5", NUMBERS, None),
        ("2 or 3", NUMBERS, None),
        ("(E)", NUMBERS, None),
        ("left", ("right", "left"), "B"),
        ("It is on the left.", ("right", "left"), "B"),
        ("leftover", ("right", "left"), None),
        ("the coffee table", ("table", "coffee table"), "B"),
        ("the table", ("table", "coffee table"), "A"),
        ("A red car is closer.", ("bed", "car"), "B"),
        ("The answer is A car.", ("bed", "car"), "B"),
        ("bookcase", ("apple", "bookcase"), "B"),
        ("", ("right", "left"), None),
    ],
)
def test_choice_verdicts(output, choices, expected):
    assert parse_choice(output, choices) == expected


ITEMS = ("pillow", "bookcase", "chair")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("The correct option is B.", "B"),
        ("The answer is option B.", "B"),
        ("Option B", "B"),
        ("B is correct.", "B"),
        ("It must be **C**!", "C"),
        ("I would choose {C}", "C"),
        ("After a long look at everything, my choice: B", "B"),
        ("option A was meant", "A"),
        ("A is right", "A"),
        ("So it is A.", "A"),
    ],
)
def test_letters_that_vlmevalkit_reads(output, expected):
    assert parse_choice(output, ITEMS) == vlmevalkit_letter(output) == expected


@pytest.mark.parametrize(
    ("output", "ours", "theirs"),
    [
        # an article or a pronoun is no letter
        ("The answer is A chair", "C", "A"),
        ("It is A cat", None, "A"),
        # a word is read as a whole, their "answer is" takes its first letter
        ("The answer is chair", "C", "C"),
        ("The answer is bed", None, "B"),
        # a letter that is marked may stand anywhere, theirs among the last four words alone
        ("(B) because of the lamp that stands beside it", "B", None),
        ("B. bookcase, which is much nearer than others", "B", None),
        ("The correct answer is (B) 1. The image shows only one.", "B", None),
        ("b", "B", None),
    ],
)
def test_where_the_reading_of_letters_differs_from_vlmevalkit(output, ours, theirs):
    assert (parse_choice(output, ITEMS), vlmevalkit_letter(output)) == (ours, theirs)


def vlmevalkit_letter(output: str, letters: str = "ABC") -> str | None:
    """VLMEvalKit's rule for letters (commit e8e78f0), in our words: the only option letter among the words, if it is
    one of the last four; else a letter right behind "answer is"."""
    words = output.translate(str.maketrans(".()[],:;!*#{}", " " * 13)).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) >= len(words) - 4:
        return found[0]
    behind = re.search(r"answer\s+is\s+\**([a-d])", output, flags=re.IGNORECASE)
    return behind[1].upper() if behind and behind[1].upper() in letters else None


filler = st.lists(st.sampled_from(["it", "is", "clearly", "option", "the", "correct", "so", "choose"]), max_size=8)


@given(filler, st.sampled_from("ABC"), st.sampled_from(["", ".", ")", "*", "!"]), filler)
def test_every_letter_that_vlmevalkit_reads_is_read(before, letter, sign, behind):
    output = " ".join([*before, letter + sign, *behind])
    article = letter == "A" and not sign and behind and behind[0] != "is" and before[-1:] != ["option"]
    theirs = vlmevalkit_letter(output)
    assert article or theirs is None or parse_choice(output, ITEMS) == theirs


words = st.text(alphabet="bcdfghklmnprstvw", min_size=3, max_size=8)
options = st.lists(words, min_size=2, max_size=6, unique=True)


@given(options, st.data())
def test_choice_reads_every_way_to_give_a_letter(choices, data):
    letter = data.draw(st.sampled_from(LETTERS[: len(choices)]))
    text = choices[LETTERS.index(letter)]
    for output in (letter, letter.lower(), f"({letter})", f"{letter}. {text}", f"The answer is ({letter}) {text}."):
        assert parse_choice(output, choices) == letter


@given(options, st.data())
def test_choice_reads_the_options_own_text(choices, data):
    index = data.draw(st.integers(0, len(choices) - 1))
    assert parse_choice(f"  {choices[index].upper()}. ", choices) == LETTERS[index]


@given(st.lists(st.integers(0, 20), min_size=2, max_size=4, unique=True), st.data())
def test_number_words_equal_digits(numbers, data):
    choices = [str(number) for number in numbers]
    word, digits = data.draw(st.sampled_from([pair for pair in NUMBER_WORDS.items() if int(pair[1]) in numbers]))
    assert parse_choice(word, choices) == parse_choice(f"{digits} of them", choices) == LETTERS[choices.index(digits)]
