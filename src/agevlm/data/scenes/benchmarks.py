"""The grounded scenes as benchmarks: the public columns of POPE, CV-Bench, OCRBench, HallusionBench and RealWorldQA.

Three columns are added to each: `id`, `mask` (1-bit picture of what the question should look at, null where the thing
asked for is absent) and `held_out_pair` (whether it is about a (color, name) pair that no training row has).
Deviations: HallusionBench has its visual-dependent half alone, each set being an original and an edited picture with
the same two questions; CV-Bench depth follows from occlusion, not from boxes.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from datasets import Features, List, Value
from datasets import Image as ImageFeature

from . import questions
from .builder import SceneBuilder
from .compose import Picture, compose, encode_image, encode_mask
from .conversations import placed_phrases
from .layout import Scene, order, sample_object, sample_scene
from .questions import Question
from .splits import Pool, is_held_out_pair
from .words import join_phrases, sentence


BENCHMARKS = ("pope", "cvbench", "ocrbench", "hallusionbench", "realworldqa")
_ATTEMPTS = 400
_ADDED = {"id": Value("string"), "mask": ImageFeature(), "held_out_pair": Value("bool")}
_STRING, _IMAGE = Value("string"), ImageFeature()


def _features(**columns) -> Features:
    return Features({"image": _IMAGE, **columns, **_ADDED})


FEATURES = {
    "pope": _features(question_id=_STRING, question=_STRING, answer=_STRING, category=_STRING, image_source=_STRING),
    "cvbench": _features(
        idx=Value("int64"), type=_STRING, task=_STRING, question=_STRING, choices=List(_STRING), answer=_STRING,
        prompt=_STRING, filename=_STRING, source=_STRING, source_dataset=_STRING, source_filename=_STRING,
    ),
    "ocrbench": _features(dataset=_STRING, question=_STRING, question_type=_STRING, answer=List(_STRING)),
    "hallusionbench": _features(
        category=_STRING, subcategory=_STRING, visual_input=_STRING, set_id=_STRING, figure_id=_STRING,
        sample_note=_STRING, question_id=_STRING, question=_STRING, gt_answer_details=_STRING, gt_answer=_STRING,
        filename=_STRING,
    ),
    "realworldqa": _features(question=_STRING, answer=_STRING, image_path=_STRING),
}  # fmt: skip
GROUP = {"pope": 2, "cvbench": 1, "ocrbench": 1, "hallusionbench": 4, "realworldqa": 1}  # questions made together


def benchmark_rows(builder: SceneBuilder, split: str, benchmark: str, index: int) -> list[dict]:
    """The `GROUP[benchmark]` rows of group number `index`."""
    pool = builder.pools[split]
    for attempt in range(_ATTEMPTS):
        rng = builder.stream(f"{split}/{benchmark}/{index}", attempt)
        rows = _MAKERS[benchmark](builder, rng, pool, index)
        if rows is not None:
            names = [f"{benchmark}-{split}-{index * GROUP[benchmark] + number:06d}" for number in range(len(rows))]
            return [{"id": name, **row} for name, row in zip(names, rows, strict=True)]
    raise ValueError(
        f"split {split} has too few names for {benchmark}: {', '.join(pool.names)}; allow more names, fewer "
        "objects in a picture, or other splits"
    )


def _shared(picture: Picture, encoded: dict, question: Question) -> dict:
    mask = picture.mask(question.look_at, question.sign)
    things = [(picture.scene.objects[i].color, picture.scene.objects[i].name) for i in question.look_at]
    return {
        "image": encoded,
        "mask": encode_mask(mask) if mask is not None else None,
        "held_out_pair": any(is_held_out_pair(*pair) for pair in (*question.about, *things)),
    }


def _one(picture: Picture, question: Question, /, **columns) -> list[dict]:
    return [{**_shared(picture, encode_image(picture.image), question), **columns}]


def _pope(builder: SceneBuilder, rng: random.Random, pool: Pool, index: int) -> list[dict] | None:
    """One question with yes and one with no about the same picture."""
    category = ("random", "popular", "adversarial")[index % 3]
    picture = builder.picture(rng, pool, word_rate=0.0)
    with_color = True if any(pool.rare_colors.values()) else None  # the words must name the held-out pair
    yes = questions.present(rng, picture.scene, pool, with_color)
    no = questions.absent(rng, picture.scene, pool, category, with_color=yes.about[0][0] is not None)
    if no is None:
        return None
    encoded = encode_image(picture.image)
    return [
        {
            **_shared(picture, encoded, question),
            "question_id": str(2 * index + number),
            "question": question.query,
            "answer": question.answer.lower(),
            "category": category,
            "image_source": f"scene-{index:06d}",
        }
        for number, question in enumerate((yes, no))
    ]


_TASKS = (("2D", "Count", questions.count), ("2D", "Relation", questions.relation), ("3D", "Depth", questions.depth))


def _cvbench(builder: SceneBuilder, rng: random.Random, pool: Pool, index: int) -> list[dict] | None:
    dimension, task, generator = _TASKS[index % 3]
    picture = builder.picture(rng, pool, word_rate=0.0, min_objects=2)
    question = generator(rng, picture.scene, pool)
    if question is None:
        return None
    return _one(
        picture, question, idx=index, type=dimension, task=task, question=question.query,
        choices=list(question.choices), answer=question.answer, prompt=question.prompt,
        filename=f"{index:06d}.jpg", source="Scenes", source_dataset="Scenes", source_filename=f"{index:06d}.jpg",
    )  # fmt: skip


_READING = {
    "what is written in the image?": "Regular Text Recognition",
    "What is the word on the sign?": "Scene Text-centric VQA",
}


def _ocrbench(builder: SceneBuilder, rng: random.Random, pool: Pool, index: int) -> list[dict] | None:
    picture = builder.picture(rng, pool, word_rate=1.0)
    question = questions.read_sign(rng, picture.scene, pool)
    if question is None:
        return None
    return _one(
        picture, question, dataset="Scenes", question=question.query, question_type=_READING[question.query],
        answer=[question.answer],
    )  # fmt: skip


def _realworldqa(builder: SceneBuilder, rng: random.Random, pool: Pool, index: int) -> list[dict] | None:
    on_colors = [questions.what_color, questions.what_is_colored] if builder.source.colors else []
    kinds = [*on_colors, questions.how_many_objects]
    generator = kinds[index % len(kinds)]
    picture = builder.picture(rng, pool, word_rate=0.1)
    question = generator(rng, picture.scene, pool)
    if question is None:
        return None
    text = question.prompt + (questions.WORD_SUFFIX if questions.WORD_SUFFIX in question.suffixes else "")
    return _one(picture, question, question=text, answer=question.answer, image_path=f"{index:06d}.jpg")


# -- HallusionBench: an original and an edited picture ---------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """A yes/no question with its truth in any scene: `check` returns (yes, indices to look at)."""

    query: str
    check: Callable[[Scene], tuple[bool, tuple[int, ...]]]
    about: tuple[tuple[str | None, str], ...]


def _is_there(name: str) -> Statement:
    return Statement(questions.presence_query(name), lambda s: (bool(s.find(name)), s.find(name)), ((None, name),))


def _has_color(name: str, color: str) -> Statement:
    return Statement(f"Is the {name} {color}?", lambda s: (bool(s.find(name, color)), s.find(name)), ((color, name),))


def _is_beside(first: str, second: str, side: str) -> Statement:
    def check(scene: Scene) -> tuple[bool, tuple[int, ...]]:
        a, b = scene.find(first)[0], scene.find(second)[0]
        return order(scene.objects[a], scene.objects[b], "x") == (-1 if side == "left" else 1), (a, b)

    query = f"Is the {first} to the {side} of the {second}?"
    return Statement(query, check, ((None, first), (None, second)))


Edit = tuple[Scene, tuple[Statement, Statement]]


def _changed(scene: Scene, index: int, **changes) -> Scene:
    things = list(scene.objects)
    things[index] = replace(things[index], **changes)
    return replace(scene, objects=tuple(things))


def _recolor(rng: random.Random, scene: Scene, pool: Pool) -> Edit | None:
    index = rng.choice(scene.single())
    thing = scene.objects[index]
    others = [c for c in questions.colors_of(pool, thing.name) if c != thing.color]
    if not others or thing.color is None:
        return None
    color = rng.choice(others)
    asked = _has_color(thing.name, thing.color), _has_color(thing.name, color)
    return _changed(scene, index, color=color), asked


def _remove(rng: random.Random, scene: Scene, pool: Pool) -> Edit | None:
    if len(scene.objects) < 2:
        return None
    index = rng.choice(scene.single())
    left = tuple(thing for i, thing in enumerate(scene.objects) if i != index)
    names = questions.absent_names(scene, pool, rng.sample(pool.names, min(6, len(pool.names))))
    control = names[0] if names and rng.random() < 0.5 else rng.choice(left).name  # keeps yes and no about equal
    return replace(scene, objects=left), (_is_there(scene.objects[index].name), _is_there(control))


def _replace(rng: random.Random, scene: Scene, pool: Pool) -> Edit | None:
    index = rng.choice(scene.single())
    thing = scene.objects[index]
    names = questions.absent_names(scene, pool, rng.sample(pool.names, min(6, len(pool.names))))
    if not names:
        return None
    new = sample_object(rng, pool, names[0], thing.x, thing.y, thing.extent)
    things = tuple(new if i == index else old for i, old in enumerate(scene.objects))
    return replace(scene, objects=things), (_is_there(thing.name), _is_there(new.name))


def _swap(rng: random.Random, scene: Scene, pool: Pool) -> Edit | None:
    single = scene.single()
    if len(single) < 2:
        return None
    a, b = rng.sample(single, 2)
    first, second = scene.objects[a], scene.objects[b]
    if order(first, second, "x") == 0:
        return None
    edited = _changed(_changed(scene, a, x=second.x, y=second.y), b, x=first.x, y=first.y)
    sides = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    one, other = (_is_beside(first.name, second.name, side) for side in sides)
    return edited, (one, other)


_EDITS = {"recolor": _recolor, "remove": _remove, "replace": _replace, "swap": _swap}


def _hallusionbench(builder: SceneBuilder, rng: random.Random, pool: Pool, index: int) -> list[dict] | None:
    kinds = [kind for kind in _EDITS if kind != "recolor" or builder.source.colors]
    kind = kinds[index % len(kinds)]
    arguments = builder.arguments
    scene = sample_scene(rng, pool, arguments.min_objects, arguments.max_objects, word_rate=0.0)
    if not scene.single():
        return None
    edit = _EDITS[kind](rng, scene, pool)
    if edit is None:
        return None
    background = builder.background(rng, pool)
    pictures = [compose(rng, s, builder.source, builder.arguments.size, background) for s in (scene, edit[0])]
    if any(len(p.scene.objects) != len(s.objects) for p, s in zip(pictures, (scene, edit[0]), strict=True)):
        return None  # something would be hidden
    if kind == "swap" and not _orders_differ(pictures, edit[1][0]):
        return None
    return list(_hallusion_rows(kind, index // len(kinds), pictures, edit[1]))


def _orders_differ(pictures: list[Picture], statement: Statement) -> bool:
    """Drawing moves centers a little; both pictures must still have a clear and opposite order."""
    orders = []
    for picture in pictures:
        a, b = statement.check(picture.scene)[1]
        orders.append(order(picture.scene.objects[a], picture.scene.objects[b], "x"))
    return orders[0] * orders[1] == -1


def _hallusion_rows(
    kind: str, number: int, pictures: list[Picture], asked: tuple[Statement, Statement]
) -> Iterator[dict]:
    for figure, picture in enumerate(pictures):
        encoded = encode_image(picture.image)
        for question_id, statement in enumerate(asked):
            yes, look_at = statement.check(picture.scene)
            question = Question("check", statement.query, statement.query, "", look_at, about=statement.about)
            yield {
                **_shared(picture, encoded, question),
                "category": "VD",
                "subcategory": kind,
                "visual_input": str(figure + 1),
                "set_id": str(number),
                "figure_id": str(figure),
                "sample_note": ("original", "edited")[figure],
                "question_id": str(question_id),
                "question": statement.query,
                "gt_answer_details": sentence(join_phrases([part for part, *_ in placed_phrases(picture.scene)])),
                "gt_answer": "1" if yes else "0",
                "filename": f"VD/{kind}/{number}_{figure}.jpg",
            }


_MAKERS = {
    "pope": _pope,
    "cvbench": _cvbench,
    "ocrbench": _ocrbench,
    "hallusionbench": _hallusionbench,
    "realworldqa": _realworldqa,
}
