"""Conversations about a scene: captions, question turns, and the same in words for a model without pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from agevlm.data.rows import IMAGE_PLACEHOLDER, occurrence_at

from .layout import Scene
from .questions import Question, prompt_of
from .words import NUMBERS, join_phrases, plural, position, sentence, with_article


Message = dict[str, str]
_WHOLE_PROMPTS = ("Describe the image.", "What is in the image?", "Write a short caption for the image.",
                  "List the objects in the image.")  # fmt: skip
_PLACES_PROMPTS = ("Describe the image and say where things are.", "What is in the image, and where?")
_SOME_PROMPTS = ("Name {} objects in the image.", "Mention {} things you see in the image.")
_ONE_PROMPTS = ("Name one object in the image.", "Mention one thing you see in the image.")
_EXTREME_PROMPTS = {"leftmost": ("x", min), "rightmost": ("x", max), "topmost": ("y", min), "lowest": ("y", max)}
_ONE_RATE, _FULL_RATE = 0.35, 0.4  # one-object scenes bring the rows with one mention to about half


@dataclass(frozen=True)
class Caption:
    """`objects`: indices of the objects that `text` mentions; `phrases`: words (color and noun) that name some of
    them, which of their occurrences in `text` (0: the first), and those objects."""

    prompt: str
    text: str
    objects: tuple[int, ...]
    phrases: tuple[tuple[str, int, tuple[int, ...]], ...]


def _caption(prompt: str, named: Sequence[tuple[str, str, tuple[int, ...]]]) -> Caption:
    """`named`: text of a part of the caption, words in it, objects that they name."""
    text, end, phrases = sentence(join_phrases([part for part, _, _ in named])), 0, []
    for part, words, objects in named:
        start = text.index(part[1:], end) - 1 + part.index(words)  # the first letter may be a capital
        end = start + len(words)
        phrases.append((words, occurrence_at(text, words, start), objects))
    return Caption(prompt, text, tuple(index for *_, objects in named for index in objects), tuple(phrases))


def _groups(scene: Scene) -> list[tuple[int, ...]]:
    """Objects that the same words describe belong together; from left to right."""
    found: dict[str, list[int]] = {}
    for index in sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].x):
        found.setdefault(scene.objects[index].described, []).append(index)
    return [tuple(indices) for indices in found.values()]


def _phrase(scene: Scene, group: tuple[int, ...]) -> tuple[str, str, tuple[int, ...]]:
    """ "Two red apples", the "red apples" in it, and their indices."""
    noun = scene.objects[group[0]].described
    if len(group) == 1:
        return with_article(noun), noun, group
    return f"{NUMBERS[len(group)]} {plural(noun)}", plural(noun), group


def placed_phrases(scene: Scene) -> list[tuple[str, str, tuple[int, ...]]]:
    """As `_phrase`, one for each object, from left to right: "a red apple on the left"."""
    things = sorted(enumerate(scene.objects), key=lambda item: item[1].x)
    return [
        (f"{with_article(thing.described)} {position(thing.x, thing.y)}", thing.described, (index,))
        for index, thing in things
    ]


def sample_caption(rng: random.Random, scene: Scene) -> Caption:
    """A caption that mentions k of the scene's n different things; k = 1 in about half of the rows, else 2 to n."""
    groups = _groups(scene)
    draw = rng.random()
    if draw < _ONE_RATE:
        return _one(rng, scene, groups)
    some = len(groups) > 2 and draw >= _ONE_RATE + _FULL_RATE
    if not some and rng.random() < 0.3:
        return _caption(rng.choice(_PLACES_PROMPTS), placed_phrases(scene))
    if not some:
        return _caption(rng.choice(_WHOLE_PROMPTS), [_phrase(scene, group) for group in groups])
    number = rng.randint(2, len(groups) - 1)
    chosen = [groups[i] for i in sorted(rng.sample(range(len(groups)), number))]
    prompt = rng.choice(_SOME_PROMPTS).format(NUMBERS[number])
    return _caption(prompt, [_phrase(scene, group) for group in chosen])


def _one(rng: random.Random, scene: Scene, groups: list[tuple[int, ...]]) -> Caption:
    if rng.random() < 0.5:
        group = rng.choice(groups)
        return _caption(rng.choice(_ONE_PROMPTS), [_phrase(scene, group)])
    word = rng.choice(tuple(_EXTREME_PROMPTS))
    axis, pick = _EXTREME_PROMPTS[word]
    index = pick(range(len(scene.objects)), key=lambda i: getattr(scene.objects[i], axis))
    return _caption(f"Name the {word} object in the image.", [_phrase(scene, (index,))])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def caption_messages(caption: Caption, prefix: str = IMAGE_PLACEHOLDER) -> list[Message]:
    return [_message("user", prefix + caption.prompt), _message("assistant", caption.text)]


def question_messages(
    rng: random.Random, questions: list[Question], prefix: str = IMAGE_PLACEHOLDER, suffixes: bool = True
) -> list[Message]:
    """Turns of questions and answers; `suffixes`: now and then with an instruction of the benchmarks."""
    messages = []
    for number, question in enumerate(questions):
        prompt = prompt_of(rng, question) if suffixes else question.prompt
        messages.append(_message("user", (prefix if number == 0 else "") + prompt))
        messages.append(_message("assistant", question.answer))
    return messages


def tell(scene: Scene) -> str:
    """The scene in words, with everything its questions ask for."""
    parts = [f"Scene: {', '.join(part for part, *_ in placed_phrases(scene))}."]
    for front, back in sorted(scene.in_front):
        names = scene.reference(front), scene.reference(back)
        if all(names):
            parts.append(f"The {names[0]} is in front of the {names[1]}.")
    if scene.word:
        parts.append(f"The sign says {scene.word}.")
    return " ".join(parts) + " "
