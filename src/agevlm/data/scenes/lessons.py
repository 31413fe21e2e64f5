"""A text curriculum: scenes in words, asked about in lessons from easy to hard, for a language model without pictures.

Every real language model can look a thing up in a text and compare two of them. One that trains for minutes learns it
only if one ability follows the other: with all kinds of questions from the start the rarer ones stay at chance
(docs/LOG.md). So each lesson asks mostly for one new ability, keeps the earlier ones up, and asks without options;
the last two bring options, captions and the instructions that rows with pictures have.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .conversations import Message, caption_messages, question_messages, sample_caption, tell
from .layout import Scene, sample_scene
from .questions import (
    Generator,
    Question,
    count,
    depth,
    how_many_objects,
    is_beside,
    is_color,
    opened,
    presence,
    read_sign,
    relation,
    what_color,
    what_is_colored,
)
from .splits import Pool


Kinds = Mapping[Generator, float]
TURNS = 8
FIRST_OPEN = 0.35  # share of questions with options that come right behind the same question without


@dataclass(frozen=True)
class Lesson:
    """Some of the conversations.

    Args:
        share: of all conversations, together 1.
        kinds: what the lesson brings: generators and how often each is drawn.
        presence: share of questions on presence.
        earlier: share of the others that are of earlier lessons.
        open: share of questions with options that are asked without them.
        objects: fewest and most of a scene.
        overlapping: something stands in front of something in every scene.
        captions: share of conversations that caption a scene instead of asking, a fifth of them one that is not told.
    """

    share: float
    kinds: Kinds = field(default_factory=dict)
    presence: float = 0.12
    earlier: float = 0.25
    open: float = 1.0
    objects: tuple[int, int] = (1, 4)
    captions: float = 0.0
    overlapping: bool = False


LESSONS = (
    Lesson(0.07, presence=1.0, objects=(1, 3)),
    Lesson(0.09, {what_color: 3, is_color: 1, what_is_colored: 2}, objects=(1, 3)),
    Lesson(0.09, {count: 2, how_many_objects: 0.5}, objects=(2, 4)),
    Lesson(0.18, {relation: 3, is_beside: 2}, objects=(2, 3)),
    Lesson(0.09, {depth: 5}, objects=(2, 4), overlapping=True),
    Lesson(0.24, {read_sign: 1}, earlier=0.95, open=0.3, captions=0.1),
    Lesson(0.24, presence=0.3, open=0.25, captions=0.15),
)
# A pretrained language model can look things up and only has to learn to answer with Yes and No.
LOOKUP = (Lesson(1.0, presence=1.0, captions=0.1),)


def text_conversations(
    rng: random.Random, pool: Pool, number: int, lessons: Sequence[Lesson] = LESSONS
) -> Iterator[list[Message]]:
    """About `number` conversations without pictures, lesson by lesson."""
    known: dict[Generator, float] = {}
    for lesson in lessons:
        kinds = _mixed(known, lesson)
        for _ in range(round(lesson.share * number)):
            words = 0.2 if read_sign in kinds else 0.0
            scene = sample_scene(rng, pool, *lesson.objects, words)
            while lesson.overlapping and not scene.in_front:
                scene = sample_scene(rng, pool, *lesson.objects, words)
            if rng.random() < lesson.captions:
                yield caption_messages(sample_caption(rng, scene), tell(scene) if rng.random() < 0.8 else "")
            else:
                asked = draw_questions(rng, scene, pool, lesson, kinds)
                yield question_messages(rng, asked, tell(scene), suffixes=lesson.captions > 0)
        known.update(lesson.kinds)


def _mixed(known: Kinds, lesson: Lesson) -> Kinds:
    """The weights of all kinds but presence, those of earlier lessons and the new ones in their own proportions."""
    earlier = (lesson.earlier if lesson.kinds else 1.0) if known else 0.0
    old = {kind: weight / sum(known.values()) * earlier for kind, weight in known.items()}
    return old | {kind: weight / sum(lesson.kinds.values()) * (1 - earlier) for kind, weight in lesson.kinds.items()}


def draw_questions(rng: random.Random, scene: Scene, pool: Pool, lesson: Lesson, kinds: Kinds) -> list[Question]:
    """`TURNS` different questions of a lesson; fewer if the scene has no more."""
    found: dict[str, Question] = {}
    for _ in range(8 * TURNS):
        if not kinds or rng.random() < lesson.presence:
            question: Question | None = presence(rng, scene, pool)
        else:
            question = rng.choices(list(kinds), list(kinds.values()))[0](rng, scene, pool)
        if question is None:
            continue
        if question.choices and rng.random() < lesson.open:
            question = opened(question)
        elif question.choices and rng.random() < FIRST_OPEN:
            found.setdefault(opened(question).prompt, opened(question))
        found.setdefault(question.prompt, question)
        if len(found) >= TURNS:
            break
    return list(found.values())[:TURNS]
