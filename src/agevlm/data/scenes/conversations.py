"""Conversations about a scene: captions, question turns, and the same in words for a model without pictures."""

import random
from dataclasses import dataclass

from agevlm.data.rows import IMAGE_PLACEHOLDER

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
    """`objects`: indices of the objects that `text` mentions."""

    prompt: str
    text: str
    objects: tuple[int, ...]


def _groups(scene: Scene) -> list[tuple[int, ...]]:
    """Objects that the same words describe belong together; from left to right."""
    found: dict[str, list[int]] = {}
    for index in sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].x):
        found.setdefault(scene.objects[index].described, []).append(index)
    return [tuple(indices) for indices in found.values()]


def _phrase(scene: Scene, group: tuple[int, ...]) -> str:
    noun = scene.objects[group[0]].described
    return with_article(noun) if len(group) == 1 else f"{NUMBERS[len(group)]} {plural(noun)}"


def placed_phrases(scene: Scene) -> list[str]:
    """One phrase for each object, from left to right: "a red apple on the left"."""
    things = sorted(scene.objects, key=lambda thing: thing.x)
    return [f"{with_article(thing.described)} {position(thing.x, thing.y)}" for thing in things]


def sample_caption(rng: random.Random, scene: Scene) -> Caption:
    """A caption that mentions k of the scene's n different things; k = 1 in about half of the rows, else 2 to n."""
    groups = _groups(scene)
    everything = tuple(index for group in groups for index in group)
    draw = rng.random()
    if draw < _ONE_RATE:
        return _one(rng, scene, groups)
    some = len(groups) > 2 and draw >= _ONE_RATE + _FULL_RATE
    if not some and rng.random() < 0.3:
        return Caption(rng.choice(_PLACES_PROMPTS), sentence(join_phrases(placed_phrases(scene))), everything)
    if not some:
        text = join_phrases([_phrase(scene, group) for group in groups])
        return Caption(rng.choice(_WHOLE_PROMPTS), sentence(text), everything)
    number = rng.randint(2, len(groups) - 1)
    chosen = [groups[i] for i in sorted(rng.sample(range(len(groups)), number))]
    text = join_phrases([_phrase(scene, group) for group in chosen])
    prompt = rng.choice(_SOME_PROMPTS).format(NUMBERS[number])
    return Caption(prompt, sentence(text), tuple(index for group in chosen for index in group))


def _one(rng: random.Random, scene: Scene, groups: list[tuple[int, ...]]) -> Caption:
    if rng.random() < 0.5:
        group = rng.choice(groups)
        return Caption(rng.choice(_ONE_PROMPTS), sentence(_phrase(scene, group)), group)
    word = rng.choice(tuple(_EXTREME_PROMPTS))
    axis, pick = _EXTREME_PROMPTS[word]
    index = pick(range(len(scene.objects)), key=lambda i: getattr(scene.objects[i], axis))
    text = sentence(with_article(scene.objects[index].described))
    return Caption(f"Name the {word} object in the image.", text, (index,))


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
    parts = [f"Scene: {', '.join(placed_phrases(scene))}."]
    for front, back in sorted(scene.in_front):
        names = scene.reference(front), scene.reference(back)
        if all(names):
            parts.append(f"The {names[0]} is in front of the {names[1]}.")
    if scene.word:
        parts.append(f"The sign says {scene.word}.")
    return " ".join(parts) + " "
