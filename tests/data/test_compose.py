"""Pictures: visible masks are disjoint, inside the picture, true to the paint, and the same whenever drawn again."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm.data.scenes.compose import MAX_HIDDEN, compose, encode_mask
from agevlm.data.scenes.layout import Scene, sample_scene
from agevlm.data.scenes.objects import COLORS, IconSource
from agevlm.images import open_image


SPLITS = st.sampled_from(["train", "composition", "name", "style"])
examples = settings(max_examples=40, deadline=None)


def draw(icons, seed: int, split: str = "train"):
    return icons.picture(random.Random(seed), icons.pools[split], word_rate=0.3, min_objects=2)


@examples
@given(st.integers(), SPLITS)
def test_visible_masks_are_disjoint_and_of_the_pictures_size(icons, seed, split):
    picture = draw(icons, seed, split)
    count = len(picture.scene.objects)
    masks = [np.asarray(picture.mask([i])) for i in range(count)]
    if picture.scene.word:
        masks.append(np.asarray(picture.mask([], sign=True)))
    assert all(m.shape == (96, 96) == picture.image.size and m.any() for m in masks)
    assert np.sum(masks, axis=0).max() == 1
    union = np.asarray(picture.mask(range(count), sign=bool(picture.scene.word)))
    assert (union == np.any(masks, axis=0)).all()
    assert picture.mask([]) is None


@examples
@given(st.integers(), SPLITS)
def test_masks_show_the_named_color(icons, seed, split):
    """The inner pixels of a visible mask are the object's tone or its lighter (white: darker) hole tone."""
    picture = draw(icons, seed, split)
    pixels = np.asarray(picture.image).astype(int)
    for index, thing in enumerate(picture.scene.objects):
        inside = np.asarray(picture.mask([index]))
        core = inside.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                core &= np.roll(inside, step, axis)
        tone = np.array(COLORS[thing.color])
        hole = tone * 0.4 + (70 if thing.color == "white" else 255) * 0.6
        # every paint of the object lies on the line between its two tones (anti-aliased ink), give or take the shade
        along = np.clip(((pixels[core] - tone) @ (hole - tone)) / ((hole - tone) @ (hole - tone)), 0, 1)
        distance = np.abs(pixels[core] - (tone + along[:, None] * (hole - tone))).max(axis=1, initial=0)
        assert (distance <= 20).mean() > 0.85 or not core.any()


@examples
@given(st.integers())
def test_nothing_is_hidden_and_the_rest_is_background(icons, seed):
    rng, size = random.Random(seed), icons.arguments.size
    scene = sample_scene(rng, icons.pools["train"], 4, 4, 1.0)
    background = np.full((size, size, 3), 128, np.uint8)
    picture = compose(rng, scene, icons.source, size, background)
    for index, thing in enumerate(picture.scene.objects):
        alone = compose(random.Random(0), Scene((thing,)), icons.source, size, background)
        visible = np.asarray(picture.mask([index])).sum() / np.asarray(alone.mask([0])).sum()
        assert visible >= 1 - MAX_HIDDEN - 0.05  # placing it again may move it by a pixel at the border
    free = picture.owner == -1
    touched = np.abs(np.asarray(picture.image).astype(int) - 128).max(-1) > 0
    assert (touched & free).sum() < 0.12 * size * size  # soft edges alone


@examples
@given(st.integers(), SPLITS)
def test_drawing_is_deterministic(icons, seed, split):
    first, second = draw(icons, seed, split), draw(icons, seed, split)
    assert first.scene == second.scene
    assert (np.asarray(first.image) == np.asarray(second.image)).all()
    assert (first.owner == second.owner).all()


@examples
@given(st.integers())
def test_mask_survives_encoding(icons, seed):
    picture = draw(icons, seed)
    mask = picture.mask([0])
    assert (np.asarray(open_image(encode_mask(mask), "x", mode="1")) == np.asarray(mask)).all()


def test_every_glyph_of_the_table_exists_and_has_ink():
    source = IconSource()
    for name, kind in source.kinds.items():
        assert len(kind.styles) >= 2
        for style in kind.styles:
            sprite = source.draw(name, style, "red", 40, 0, 0.0)
            assert 0.05 < sprite.alpha.mean() < 1, (name, style)


def test_sprites_scale_with_their_extent():
    source = IconSource(["house", "key"])
    for extent in (30, 60, 200, 400):
        alpha = source.draw("house", "fontawesome", "blue", extent, 0, 0.0).alpha
        longest = max(np.ptp(np.flatnonzero(alpha.any(axis))) + 1 for axis in (0, 1))
        assert longest == pytest.approx(extent, rel=0.12)


def test_unknown_names_and_colors_are_named_with_close_matches():
    with pytest.raises(ValueError, match=r"unknown object name 'bycicle'; did you mean 'bicycle'"):
        IconSource(names=["bycicle"])
    with pytest.raises(ValueError, match=r"unknown color 'purpel'; did you mean 'purple'"):
        IconSource(colors=["red", "purpel"])
