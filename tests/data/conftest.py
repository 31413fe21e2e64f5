"""Shared by the data tests: one scene builder, and an independent solver of questions."""

import re

import pytest

from agevlm.data.scenes.builder import SceneArguments, SceneBuilder
from agevlm.data.scenes.layout import Scene
from agevlm.data.scenes.objects import COLORS
from agevlm.data.scenes.words import NUMBERS, plural


@pytest.fixture(scope="session")
def icons() -> SceneBuilder:
    return SceneBuilder(SceneArguments(size=96))


@pytest.fixture(scope="session")
def solve():
    return _solve


def _split_noun(noun: str) -> tuple[str | None, str]:
    first, _, rest = noun.partition(" ")
    return (first, rest) if rest and first in COLORS else (None, noun)


def _matching(scene: Scene, noun: str) -> list[int]:
    color, name = _split_noun(noun)
    return [i for i, o in enumerate(scene.objects) if o.name == name and color in (None, o.color)]


def _one(scene: Scene, noun: str) -> int:
    (index,) = _matching(scene, noun)
    return index


def _options(prompt: str) -> dict[str, str]:
    """Letter -> text of "(A) text" and "A. text" lines."""
    return dict(re.findall(r"^\(?([A-F])[).] (.+)$", prompt, re.MULTILINE))


def _solve(scene: Scene, prompt: str, answer: str) -> set[int] | None:
    """Asserts that `answer` is right, judging by the prompt's words and the scene's objects alone.

    Returns the objects to look at; None: the sign."""
    right, look_at = _right_answer(scene, prompt)
    given = _options(prompt)
    assert (given[answer.strip("()")] if given else answer) == right, (prompt, answer, right)
    assert len(set(given.values())) == len(given)
    return look_at


def _right_answer(scene: Scene, prompt: str) -> tuple[str, set[int] | None]:
    stem = prompt.split("\n")[0]
    patterns = {
        r"Is there an? (.+) in the image\?": lambda noun: (bool(_matching(scene, noun)), _matching(scene, noun)),
        r"How many objects are in the image\?": lambda: (NUMBERS[len(scene.objects)], range(len(scene.objects))),
        r"How many (.+) are in the image\?": lambda nouns: _count(scene, nouns),
        r".*where is the (.+) located with respect to the (.+)\?.*": lambda a, b: _relation(scene, prompt, a, b),
        r"Which object is closer .*, the (.+) or the (.+)\? .*": lambda a, b: _depth(scene, a, b),
        r"what is written in the image\?|What is the word on the sign\?": lambda: (scene.word, None),
        r"Is the (.+) to the (left|right) of the (.+)\?": lambda a, side, b: _beside(scene, a, side, b),
        r"Is the (.+) (\w+)\?": lambda name, color: (
            scene.objects[_one(scene, name)].color == color,
            _matching(scene, name),
        ),
        r"What color is the (.+)\?": lambda name: (scene.objects[_one(scene, name)].color, _matching(scene, name)),
        r"What object is (\w+)\?": lambda color: _colored(scene, color),
    }
    for pattern, answer in patterns.items():
        found = re.match(pattern, stem)
        if found:
            right, look_at = answer(*found.groups())
            text = {True: "Yes", False: "No"}.get(right, right) if isinstance(right, bool) else right
            return text, None if look_at is None else set(look_at)
    raise AssertionError(f"unknown question {prompt!r}")


def _count(scene, nouns):
    found = [i for i, o in enumerate(scene.objects) if plural(o.name) == nouns]
    return str(len(found)), found


def _relation(scene, prompt, a, b):
    a, b = _one(scene, a), _one(scene, b)
    across = "left" in _options(prompt).values()
    first, second = (scene.objects[i].x if across else scene.objects[i].y for i in (a, b))
    assert abs(first - second) >= 0.15
    return (("left", "right") if across else ("above", "below"))[first > second], (a, b)


def _depth(scene, a, b):
    a, b = _one(scene, a), _one(scene, b)
    assert (max(a, b), min(a, b)) in scene.in_front
    return scene.reference(max(a, b)), (a, b)


def _beside(scene, a, side, b):
    a, b = _one(scene, a), _one(scene, b)
    return (scene.objects[a].x < scene.objects[b].x) == (side == "left"), (a, b)


def _colored(scene, color):
    (index,) = [i for i, o in enumerate(scene.objects) if o.color == color]
    return scene.objects[index].name, (index,)
