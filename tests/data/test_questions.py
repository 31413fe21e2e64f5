"""Every answer and every place to look is found again from the question's words and the scene's objects alone."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm.data.rows import find_query
from agevlm.data.scenes.conversations import (
    caption_messages,
    question_messages,
    sample_caption,
    tell,
)
from agevlm.data.scenes.layout import sample_scene
from agevlm.data.scenes.lessons import LESSONS, text_conversations
from agevlm.data.scenes.objects import COLORS
from agevlm.data.scenes.questions import (
    LETTERS,
    absent,
    count,
    opened,
    presence,
    relation,
    sample_questions,
    what_color,
)
from agevlm.data.scenes.splits import is_held_out_pair
from agevlm.data.scenes.words import NUMBERS, article, cell, join_phrases, plural, position


SPLITS = st.sampled_from(["train", "composition", "name", "style", "text"])
examples = settings(max_examples=150, deadline=None)


def scene_of(icons, seed: int, split: str):
    rng, pool = random.Random(seed), icons.pools[split]
    return rng, pool, sample_scene(rng, pool, 1, 4, 0.5)


@examples
@given(st.integers(), SPLITS)
def test_answers_and_places_to_look(icons, solve, seed, split):
    rng, pool, scene = scene_of(icons, seed, split)
    for question in sample_questions(rng, scene, pool, 6):
        look_at = solve(scene, question.prompt, question.answer)
        assert question.query in question.prompt
        assert (set(question.look_at), question.sign) == ((look_at, False) if look_at is not None else (set(), True))


@examples
@given(st.integers(), SPLITS)
def test_spoken_conversations_stay_true(icons, solve, seed, split):
    rng, pool, scene = scene_of(icons, seed, split)
    messages = question_messages(rng, sample_questions(rng, scene, pool, 4))
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert messages[0]["content"].startswith("<|image|>")
    for asked, answered in zip(messages[::2], messages[1::2], strict=True):
        solve(scene, asked["content"].removeprefix("<|image|>"), answered["content"])


@examples
@given(st.integers(), SPLITS, st.sampled_from(["random", "popular", "adversarial"]))
def test_absent_things_are_absent_and_no_synonym_is_present(icons, seed, split, strategy):
    rng, pool, scene = scene_of(icons, seed, split)
    question = absent(rng, scene, pool, strategy)
    if question is None:
        return
    ((color, name),) = question.about
    assert question.answer == "No" and not question.look_at
    assert not [o for o in scene.objects if o.name == name and color in (None, o.color)]
    if any(o.name == name for o in scene.objects):
        assert color is not None and strategy == "adversarial"
    else:
        assert pool.kinds[name].group not in {o.group for o in scene.objects}
    if strategy == "popular":
        assert name in pool.popular


def test_presence_is_balanced_and_every_kind_of_question_occurs(icons):
    rng, pool = random.Random(0), icons.pools["train"]
    scenes = [sample_scene(rng, pool, 1, 4, 0.3) for _ in range(600)]
    yes = sum(presence(rng, scene, pool).answer == "Yes" for scene in scenes)
    assert 250 < yes < 350
    asked = [q for scene in scenes for q in sample_questions(rng, scene, pool, 4)]
    kinds = [question.kind for question in asked]
    assert set(kinds) == {"presence", "count", "relation", "depth", "read", "check", "free"}
    assert 0.5 < kinds.count("presence") / len(kinds) < 0.75
    letters = [q.answer for q in asked if q.kind in ("relation", "depth")]
    assert 0.4 < letters.count("(A)") / len(letters) < 0.6


@pytest.mark.parametrize("split", ["train", "composition", "name"])
def test_colors_and_held_out_pairs_are_named_as_often_with_yes_as_with_no(icons, split):
    """Else the words alone would tell the answer (a color named: yes, 71 % of a former POPE)."""
    pool = icons.pools[split]
    told: dict[str, list[tuple[bool, bool]]] = {"Yes": [], "No": []}
    for seed in range(3000):
        rng = random.Random(seed)
        question = presence(rng, sample_scene(rng, pool, 1, 4, 0), pool)
        ((color, name),) = question.about
        told[question.answer].append((color is not None, is_held_out_pair(color, name)))
    for yes, no in zip(*(np.mean(pairs, axis=0) for pairs in told.values()), strict=True):
        assert abs(yes - no) < 0.07  # 4 standard errors


def test_the_place_of_a_right_count_says_nothing(icons):
    """Overall and for every number: in ascending order "(A)" and "(B)" would be right most of the time."""
    rng, pool = random.Random(0), icons.pools["composition"]
    places: dict[str, list[int]] = {"any": []}
    for _ in range(4000):
        question = count(rng, sample_scene(rng, pool, 2, 4, 0), pool)
        place = LETTERS.index(question.answer[1])
        places["any"].append(place)
        places.setdefault(question.choices[place], []).append(place)
        numbers = sorted(map(int, question.choices))
        assert numbers == list(range(numbers[0], numbers[0] + 4))
    assert places.keys() == {"any", "0", "1", "2", "3", "4"}
    for found in (found for found in places.values() if len(found) > 400):
        for place in range(4):
            assert abs(found.count(place) / len(found) - 0.25) < 2 / len(found) ** 0.5  # over 4 standard errors


@pytest.mark.parametrize("turns", [1, 3, 6, 16])
def test_the_answer_to_presence_does_not_depend_on_the_number_of_turns_or_earlier_answers(icons, turns):
    rng, pool = random.Random(turns), icons.pools["train"]
    rows = [sample_questions(rng, sample_scene(rng, pool, 1, 3, 0.1), pool, turns) for _ in range(1500)]
    answers = [[question.answer for question in row if question.kind == "presence"] for row in rows]
    pooled = [answer for row in answers for answer in row]
    assert 0.45 < pooled.count("Yes") / len(pooled) < 0.55
    last_after_yes = [row[-1] for row in answers if len(row) > 2 and row[:-1].count("Yes") > len(row[:-1]) / 2]
    if turns > 3:
        assert 0.42 < last_after_yes.count("Yes") / len(last_after_yes) < 0.58


@examples
@given(st.integers(), SPLITS)
def test_captions_mention_exactly_the_masked_objects(icons, seed, split):
    rng, _, scene = scene_of(icons, seed, split)
    caption = sample_caption(rng, scene)
    user, assistant = caption_messages(caption)
    assert user["content"] == f"<|image|>{caption.prompt}" and assistant["content"] == caption.text
    told = [scene.objects[i].described for i in caption.objects]
    if not caption.prompt.startswith("Name the "):  # words that fit several objects mean all of them
        assert set(caption.objects) == {i for i, thing in enumerate(scene.objects) if thing.described in told}
    words = caption.text[0].lower() + caption.text[1:]
    placed = "where" in caption.prompt
    for noun in set(told):
        many = told.count(noun) > 1 and not placed
        assert (f"{NUMBERS[told.count(noun)]} {plural(noun)}" if many else f"{article(noun)} {noun}") in words
    assert sorted(index for *_, objects in caption.phrases for index in objects) == sorted(caption.objects)
    assert len({phrase[:2] for phrase in caption.phrases}) == len(caption.phrases)
    for query, occurrence, objects in caption.phrases:
        assert query in {
            name for i in objects for name in (scene.objects[i].described, plural(scene.objects[i].described))
        }
        assert find_query(caption.text, {"query": query, "occurrence": occurrence}) >= 0
    mentions = sum(re.findall(r"\w+", words).count(color) for color in COLORS)
    assert mentions == (len(told) if placed else len(set(told)))


def test_half_of_the_captions_mention_one_object(icons):
    rng, pool = random.Random(3), icons.pools["train"]
    captions = [sample_caption(rng, sample_scene(rng, pool, 1, 4, 0)) for _ in range(1500)]
    assert 0.42 < sum(len(caption.objects) == 1 for caption in captions) / len(captions) < 0.6


@examples
@given(st.integers())
def test_extreme_objects_are_extreme(icons, seed):
    rng, _, scene = scene_of(icons, seed, "train")
    caption = sample_caption(rng, scene)
    axis_and_sign = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "lowest": ("y", -1)}
    for word, (axis, sign) in axis_and_sign.items():
        if word in caption.prompt:
            (index,) = caption.objects
            assert all(sign * getattr(scene.objects[index], axis) <= sign * getattr(o, axis) for o in scene.objects)


@examples
@given(st.integers())
def test_told_scenes_hold_what_is_asked(icons, seed):
    """A reader of the words alone can answer: objects, places, order in depth and the sign are all told."""
    _, _, scene = scene_of(icons, seed, "text")
    text = tell(scene)
    for thing in scene.objects:
        assert f"{article(thing.described)} {thing.described} {position(thing.x, thing.y)}" in text
    assert (scene.word or "Scene") in text
    if scene.word is None:
        assert "sign says" not in text


def test_text_conversations_have_no_pictures_and_are_reproducible(icons):
    pool = icons.pools["text"]
    first = list(text_conversations(random.Random("s"), pool, 200))
    assert first == list(text_conversations(random.Random("s"), pool, 200))
    assert all("<|image|>" not in m["content"] for messages in first for m in messages)
    assert all(m["role"] == ("user", "assistant")[i % 2] for messages in first for i, m in enumerate(messages))


def test_lessons_ask_for_one_new_thing_after_the_other(icons):
    """Presence first; options, signs and captions last; questions without options are answered in words."""
    conversations = list(text_conversations(random.Random("s"), icons.pools["text"], 1000))
    places = [
        [any(needle in m["content"] for m in messages) for messages in conversations]
        for needle in ("What color", "How many", "relative positions", "closer to the camera", "(A)", "The sign says")
    ]
    starts = [asked.index(True) for asked in places]
    assert starts == sorted(starts) and starts[0] > 50 and starts[4] > 500
    early = conversations[: starts[4]]
    assert not any(m["content"].strip("()") in LETTERS for messages in early for m in messages)
    assert not any(m["content"].startswith(("Describe", "Name")) for messages in early for m in messages)
    assert sum(lesson.share for lesson in LESSONS) == pytest.approx(1)


def test_a_question_without_options_says_what_the_right_one_says(icons):
    for seed in range(200):
        rng, pool, scene = scene_of(icons, seed, "train")
        for generate in (count, relation, what_color):
            question = generate(rng, scene, pool)
            if question is not None and question.choices:
                words = opened(question)
                letter = question.answer.strip("()")
                assert re.search(rf"(?m)^\(?{letter}[.)] (.*)$", question.prompt).group(1).strip() == words.answer
                assert words.prompt.startswith(question.query) and "(A)" not in words.prompt and not words.suffixes


@pytest.mark.parametrize(
    ("singular", "many"),
    [("apple", "apples"), ("bus", "buses"), ("pine tree", "pine trees"), ("knife", "knives"), ("fish", "fish"),
     ("clownfish", "clownfish"), ("torch", "torches"), ("cherry", "cherries"), ("key", "keys"), ("box", "boxes")],
)  # fmt: skip
def test_plurals(singular, many):
    assert plural(singular) == many


@pytest.mark.parametrize(
    ("noun", "word"),
    [("apple", "an"), ("red apple", "a"), ("orange apple", "an"), ("unicorn", "a"), ("umbrella", "an"),
     ("hourglass", "an")],
)  # fmt: skip
def test_articles(noun, word):
    assert article(noun) == word


def test_lists_and_places():
    assert [join_phrases("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    assert position(0.1, 0.1) == "at the top left" and position(0.5, 0.5) == "in the center"
    assert [cell(v) for v in (0.0, 0.34, 1.0)] == [0, 1, 2]
    assert NUMBERS[4] == "four"
