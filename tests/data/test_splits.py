"""Nothing that is held out leaks into training: not in pictures, not in words."""

import random
import re

import pytest

from agevlm.data.scenes.build import text_corpus
from agevlm.data.scenes.objects import COLORS, IconSource
from agevlm.data.scenes.splits import held_out_names, held_out_style, is_held_out_pair, make_pools
from agevlm.data.scenes.words import SIGN_WORDS, plural


KINDS = IconSource().kinds
_NAMES = sorted((word for name in KINDS for word in (name, plural(name))), key=len, reverse=True)
_NOUN = re.compile(rf"\b(?:({'|'.join(COLORS)}) )?({'|'.join(_NAMES)})\b", re.IGNORECASE)
_SINGULAR = {word: name for name in KINDS for word in (name, plural(name))}


def pairs_in(text: str) -> set[tuple[str | None, str]]:
    """Every (color or None, name) that a text speaks of, "Is the apple red?" included."""
    found = {(m[1] and m[1].lower(), _SINGULAR[m[2].lower()]) for m in _NOUN.finditer(text)}
    for name, color in re.findall(rf"Is the (?:\w+ )*?({'|'.join(_NAMES)}) ({'|'.join(COLORS)})\?", text):
        found.add((color, name))
    return found


def training_texts(icons, count: int):
    for index in range(count):
        for make in (icons.caption_row, icons.instruction_row):
            row, mask, phrases = make(index)
            queries = [guided["query"] for guided in (mask, *phrases) if guided]
            yield " | ".join([*(m["content"] for m in row["messages"]), *queries])


def test_held_out_shares():
    names = held_out_names(KINDS)
    assert len(names) == round(0.1 * len(KINDS))
    pairs = [(c, n) for c in COLORS for n in KINDS]
    assert 0.07 < sum(is_held_out_pair(*pair) for pair in pairs) / len(pairs) < 0.13
    assert all(held_out_style(kind) in kind.styles for kind in KINDS.values())


def test_no_held_out_name_or_pair_in_training_words(icons):
    unseen = set(held_out_names(KINDS))
    for text in training_texts(icons, 250):
        for color, name in pairs_in(text):
            assert name not in unseen, text
            assert not is_held_out_pair(color, name), text


def test_no_held_out_pair_in_the_text_corpus_but_every_name():
    seen = set()
    for messages in text_corpus(1500):
        pairs = pairs_in(" | ".join(m["content"] for m in messages))
        assert not any(is_held_out_pair(*pair) for pair in pairs)
        seen |= {name for _, name in pairs}
    assert seen == set(KINDS)


@pytest.mark.parametrize("split", ["train", "composition", "name", "style"])
def test_objects_of_each_split(icons, split):
    unseen = set(held_out_names(KINDS))
    rare = 0
    for seed in range(120):
        picture = icons.picture(random.Random(seed), icons.pools[split], word_rate=0.5)
        for thing in picture.scene.objects:
            new_style = thing.style == held_out_style(KINDS[thing.name])
            new_pair = is_held_out_pair(thing.color, thing.name)
            rare += new_pair
            assert (thing.name in unseen) == (split == "name")
            if split != "name":
                assert new_style == (split == "style")
            assert split == "composition" or not new_pair
        word = picture.scene.word
        assert word is None or (word in icons.pools["name"].words) == (split == "name")
    assert (rare > 20) == (split == "composition")


def test_scenes_of_splits_come_from_other_random_streams(icons):
    streams = [icons.stream(part, 0).random() for part in ("captions", "instructions", "name/pope/0", "style/pope/0")]
    assert len(set(streams)) == len(streams)


def test_membership_does_not_depend_on_the_selection(icons):
    few = IconSource(sorted(KINDS)[:30], ["red", "blue", "green"])
    pools = make_pools(few.kinds, few.colors)
    whole = icons.pools
    for name in pools["train"].names:
        assert set(pools["train"].colors[name]) <= set(whole["train"].colors[name])
        assert pools["train"].styles[name] == whole["train"].styles[name]


def test_too_few_names_are_refused():
    few = IconSource(["cat", "dog", "car"])
    with pytest.raises(ValueError, match="at least 6 object names"):
        make_pools(few.kinds, few.colors)


def test_sign_words_name_no_object():
    assert not {word.lower() for word in SIGN_WORDS} & set(KINDS)
