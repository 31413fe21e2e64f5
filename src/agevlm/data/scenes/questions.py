"""Questions about a scene, their answers and what to look at, in the wording of the public benchmarks.

Each generator takes (rng, scene, pool) and returns a `Question`, or None where the scene does not allow one. They use
the scene's facts alone, so the same questions serve drawn pictures and scenes described in words.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .layout import RARE_RATE, Scene, order, sample_color
from .splits import Pool
from .words import NUMBERS, plural, with_article


LETTERS = "ABCDEF"
YES_NO_SUFFIXES = (" Please answer yes or no.", "\nAnswer the question using a single word or phrase.")
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nPlease answer directly with a single word or number."
OPTION_SUFFIX = "\nPlease answer directly with only the letter of the correct option and nothing else."


@dataclass(frozen=True)
class Question:
    """`query`: the words that should steer the look, always part of `prompt`; `suffixes`: instructions that benchmarks
    append. `look_at`: indices of objects, empty where the thing asked for is absent; `sign`: look at the sign.
    `about`: (color or None, name) pairs that question and options name."""

    kind: str
    query: str
    prompt: str
    answer: str
    look_at: tuple[int, ...] = ()
    sign: bool = False
    about: tuple[tuple[str | None, str], ...] = ()
    choices: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()


Generator = Callable[[random.Random, Scene, Pool], Question | None]


def _yes_no(kind: str, query: str, yes: bool, look_at: Sequence[int], about) -> Question:
    answer = "Yes" if yes else "No"
    return Question(kind, query, query, answer, tuple(look_at), about=tuple(about), suffixes=YES_NO_SUFFIXES)


def _multiple_choice(kind: str, query: str, choices: Sequence[str], right: str, look_at, about) -> Question:
    """CV-Bench's form: stem, "Select from the following choices.", one "(A) text" a line; the answer is "(A)"."""
    lines = "".join(f"\n({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    prompt = f"{query} Select from the following choices.{lines}"
    answer = f"({LETTERS[list(choices).index(right)]})"
    look_at, about, choices = tuple(look_at), tuple(about), tuple(choices)
    return Question(kind, query, prompt, answer, look_at, False, about, choices, (LETTER_SUFFIX,))


# -- presence (POPE) --------------------------------------------------------------------------------------------------


def presence_query(noun: str) -> str:
    return f"Is there {with_article(noun)} in the image?"


def present(rng: random.Random, scene: Scene, pool: Pool, with_color: bool | None = None) -> Question:
    """About something in the picture; looks at every object that fits the words."""
    thing = rng.choice(scene.objects)
    colored = thing.color is not None and (rng.random() < 0.5 if with_color is None else with_color)
    color = thing.color if colored else None
    query = presence_query(thing.described if colored else thing.name)
    return _yes_no("presence", query, True, scene.find(thing.name, color), [(color, thing.name)])


def absent_names(scene: Scene, pool: Pool, names: Sequence[str]) -> list[str]:
    """`names` without those in the picture and without their near synonyms."""
    groups = {thing.group for thing in scene.objects}
    return [name for name in names if pool.kinds[name].group not in groups]


def absent(
    rng: random.Random, scene: Scene, pool: Pool, strategy: str | None = None, with_color: bool | None = None
) -> Question | None:
    """About something not in the picture, chosen at random, among the most frequent names, or to mislead
    ("adversarial": the category of something present; with a color, its name in another color or another name in its
    color). Colors, held-out pairs too, are named as often as by `present`: the words alone do not tell the answer."""
    strategy = strategy or rng.choice(("random", "popular", "adversarial"))
    thing = rng.choice(scene.objects)
    colored = rng.random() < 0.5 if with_color is None else with_color
    color: str | None = None
    if strategy != "adversarial":
        names = _some(rng, pool.popular if strategy == "popular" else pool.names)
    elif thing.color is None or not colored:
        names = _some(rng, pool.by_category[thing.category]) + _some(rng, pool.names)
    elif rng.random() < 0.5:
        color = sample_color(rng, pool, thing.name, taken={o.color for o in scene.objects if o.name == thing.name})
        return _absent(color, thing.name) if color else None
    else:
        color = thing.color
        names = [name for name in _some(rng, pool.names) if pool.allowed(thing.color, name)]
        if rng.random() < RARE_RATE:
            names.sort(key=lambda name: color not in pool.rare_colors[name])
    names = absent_names(scene, pool, names)
    if not names:
        return None
    if colored and color is None:
        color = sample_color(rng, pool, names[0])
    return _absent(color, names[0])


def _some(rng: random.Random, names: Sequence[str]) -> list[str]:
    return rng.sample(names, min(8, len(names)))


def colors_of(pool: Pool, name: str) -> tuple[str, ...]:
    return (*(c for c in pool.colors[name] if c), *pool.rare_colors[name])


def _absent(color: str | None, name: str) -> Question:
    noun = name if color is None else f"{color} {name}"
    return _yes_no("presence", presence_query(noun), False, (), [(color, name)])


# -- counting, relation, depth (CV-Bench) ----------------------------------------------------------------------------


def count(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    thing = rng.choice(scene.objects)
    name = thing.name
    if rng.random() < 0.2:
        names = absent_names(scene, pool, rng.sample(pool.names, min(4, len(pool.names))))
        name = names[0] if names else name
    found = scene.find(name)
    right = len(found)
    start = rng.randint(max(0, right - 3), min(2, right) if right <= 5 else right)
    choices = [str(number) for number in range(start, start + 4)]
    rng.shuffle(choices)  # in ascending order the right one would mostly be among the first two
    query = f"How many {plural(name)} are in the image?"
    return _multiple_choice("count", query, choices, str(right), found, [(None, name)])


def _pair(rng: random.Random, scene: Scene, axis: str) -> tuple[int, int] | None:
    """Two objects that words tell apart and that lie clearly apart along `axis`, in random order."""
    named = [index for index in range(len(scene.objects)) if scene.reference(index)]
    pairs = [(a, b) for a in named for b in named if a != b and order(scene.objects[a], scene.objects[b], axis)]
    return rng.choice(pairs) if pairs else None


def _about(scene: Scene, *indices: int) -> list[tuple[str | None, str]]:
    """The (color, name) pairs that `Scene.reference` speaks of."""
    things = [(scene.objects[i], scene.reference(i)) for i in indices]
    return [(thing.color if words != thing.name else None, thing.name) for thing, words in things]


_WORDS = {"x": ("left", "right"), "y": ("above", "below")}


def relation(rng: random.Random, scene: Scene, pool: Pool, axis: str | None = None) -> Question | None:
    axis = axis or rng.choice("xxy")
    pair = _pair(rng, scene, axis)
    if pair is None:
        return None
    a, b = pair
    first, second = scene.reference(a), scene.reference(b)
    words = _WORDS[axis]
    right = words[0] if order(scene.objects[a], scene.objects[b], axis) < 0 else words[1]
    choices = list(words) if rng.random() < 0.5 else list(words[::-1])
    query = (f"Considering the relative positions of the {first} and the {second} in the image provided, "
             f"where is the {first} located with respect to the {second}?")  # fmt: skip
    return _multiple_choice("relation", query, choices, right, pair, _about(scene, a, b))


def depth(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    """Which of two overlapping objects is in front."""
    pairs = [
        ((f, b), [nearer, farther])
        for f, b in sorted(scene.in_front)
        if (nearer := scene.reference(f)) and (farther := scene.reference(b))
    ]
    if not pairs:
        return None
    (front, back), names = rng.choice(pairs)
    shown = names if rng.random() < 0.5 else names[::-1]
    query = f"Which object is closer to the camera taking this photo, the {shown[0]} or the {shown[1]}?"
    return _multiple_choice("depth", query, shown, names[0], (front, back), _about(scene, front, back))


# -- reading (OCRBench) ----------------------------------------------------------------------------------------------


def read_sign(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    if scene.word is None:
        return None
    query = rng.choice(("what is written in the image?", "What is the word on the sign?"))
    return Question("read", query, query, scene.word, sign=True)


# -- statements to check (HallusionBench) ----------------------------------------------------------------------------


def is_color(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    single = [index for index in scene.single() if scene.objects[index].color]
    if not single:
        return None
    index = rng.choice(single)
    thing = scene.objects[index]
    color = thing.color
    if rng.random() < 0.5:
        others = [c for c in colors_of(pool, thing.name) if c != color]
        color = rng.choice(others) if others else color
    query = f"Is the {thing.name} {color}?"
    return _yes_no("check", query, color == thing.color, (index,), [(color, thing.name)])


def is_beside(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    pair = _pair(rng, scene, "x")
    if pair is None:
        return None
    a, b = pair
    left = rng.random() < 0.5
    query = f"Is the {scene.reference(a)} to the {'left' if left else 'right'} of the {scene.reference(b)}?"
    yes = (order(scene.objects[a], scene.objects[b], "x") < 0) == left
    return _yes_no("check", query, yes, pair, _about(scene, a, b))


# -- free questions (RealWorldQA) ------------------------------------------------------------------------------------


def _free(rng: random.Random, query: str, answer: str, look_at, about, distractors: Sequence[str]) -> Question:
    """Half of them open, half with lettered options and the instruction that RealWorldQA keeps in the question."""
    if rng.random() < 0.5 or not distractors:
        return Question("free", query, query, answer, tuple(look_at), about=tuple(about), suffixes=(WORD_SUFFIX,))
    choices = [answer, *distractors[:3]]
    rng.shuffle(choices)
    lines = "".join(f"\n{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))
    letter = LETTERS[choices.index(answer)]
    prompt = query + lines + OPTION_SUFFIX
    return Question("free", query, prompt, letter, tuple(look_at), about=tuple(about), choices=tuple(choices))


def what_color(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    single = [(index, color) for index in scene.single() if (color := scene.objects[index].color)]
    if not single:
        return None
    index, color = rng.choice(single)
    name = scene.objects[index].name
    others = [c for c in colors_of(pool, name) if c != color]
    rng.shuffle(others)
    return _free(rng, f"What color is the {name}?", color, (index,), [(None, name)], others)


def what_is_colored(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    colors = [o.color for o in scene.objects]
    single = [(i, color) for i, color in enumerate(colors) if color and colors.count(color) == 1]
    if not single:
        return None
    index, color = rng.choice(single)
    name = scene.objects[index].name
    others = [n for n in absent_names(scene, pool, rng.sample(pool.names, min(6, len(pool.names))))
              if pool.allowed(color, n)]  # fmt: skip
    return _free(rng, f"What object is {color}?", name, (index,), [(color, name)], others)


def how_many_objects(rng: random.Random, scene: Scene, pool: Pool) -> Question | None:
    total = len(scene.objects)
    others = [NUMBERS[number] for number in range(1, 6) if number != total]
    rng.shuffle(others)
    everything = tuple(range(total))
    return _free(rng, "How many objects are in the image?", NUMBERS[total], everything, (), others)


def opened(question: Question) -> Question:
    """The question without its options; the answer is what the right one says.

    A relation keeps them without letters: they say along which axis.
    """
    if not question.choices:
        return question
    answer = question.choices[LETTERS.index(question.answer.strip("()"))]
    axis = f" {' or '.join(question.choices).capitalize()}?" if question.kind == "relation" else ""
    return replace(question, prompt=question.query + axis, answer=answer, suffixes=())


OTHERS: tuple[Generator, ...] = (
    count, count, relation, relation, depth, depth, read_sign, read_sign,
    is_color, is_beside, what_color, what_is_colored, how_many_objects,
)  # fmt: skip


def presence(rng: random.Random, scene: Scene, pool: Pool) -> Question:
    """Yes in half of the cases."""
    return (present if rng.random() < 0.5 else _surely_absent)(rng, scene, pool)


def _surely_absent(rng: random.Random, scene: Scene, pool: Pool) -> Question:
    """Not every way to mislead exists in every scene; something drawn at random is always absent somewhere."""
    for strategy in (None, *["random"] * 20, *["adversarial"] * 20):
        question = absent(rng, scene, pool, strategy)
        if question is not None:
            return question
    raise ValueError(f"Every one of the {len(pool.names)} names is in the scene: give more `names`.")


def _other(rng: random.Random, scene: Scene, pool: Pool) -> Question:
    """Anything but presence, of a kind that the scene allows."""
    while True:  # the number of objects can always be asked
        question = rng.choice(OTHERS)(rng, scene, pool)
        if question is not None:
            return question


def prompt_of(rng: random.Random, question: Question) -> str:
    """The prompt as training rows have it: sometimes with an instruction of the benchmarks behind it."""
    return question.prompt + (rng.choice(question.suffixes) if question.suffixes and rng.random() < 0.3 else "")


def sample_questions(
    rng: random.Random, scene: Scene, pool: Pool, number: int, presence_alone: bool = False
) -> list[Question]:
    """`number` different questions (fewer if the scene has no more).

    Two thirds of them are on presence, but no more than the scene has different answers "yes" for: each answer is then
    an independent coin, and neither the number of turns nor the earlier answers say which comes next.
    `presence_alone` asks for nothing else.
    """
    present_things = {words for thing in scene.objects for words in (thing.name, thing.described)}
    asked = number if presence_alone else sum(rng.random() < 2 / 3 for _ in range(number))
    on_presence = min(asked, len(present_things))
    drawn = [present if rng.random() < 0.5 else _surely_absent for _ in range(on_presence)]
    drawn += [_other] * (0 if presence_alone else number - on_presence)
    rng.shuffle(drawn)
    found: dict[str, Question] = {}
    for draw in drawn:
        for _ in range(20):
            question = draw(rng, scene, pool)
            if question.query not in found:
                found[question.query] = question
                break
    return list(found.values())
