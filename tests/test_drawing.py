"""Drawing: heat covers what is looked at and nothing else, outlines follow masks and stand out, sheets hold all."""

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image, ImageChops

from agevlm.drawing import (
    COLORS,
    GAP,
    LEAST_PEAK,
    MOST_LINES,
    OPACITY,
    SIDE,
    _font,
    _lines,
    enlarge,
    heat_layer,
    outline,
    outline_phrases,
    overlay,
    panels,
    peak_of,
)
from builders import mask, picture


GREY = Image.new("RGB", (60, 40), (128, 128, 128))


def heat(row: int, column: int) -> np.ndarray:
    values = np.zeros((40, 60), dtype=np.float32)
    values[row - 4 : row + 4, column - 4 : column + 4] = 1
    return values


def test_heat_lies_in_its_place_and_leaves_the_rest_of_the_picture_alone():
    photo = picture(60, 40)
    drawn, plain = overlay(photo, heat(10, 50)), enlarge(photo)
    changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).max(-1) > 0
    rows, columns = np.nonzero(changed)
    scale = drawn.width / 60
    np.testing.assert_allclose([columns.min(), columns.max()], [46 * scale, 54 * scale], atol=2 * scale)
    np.testing.assert_allclose([rows.min(), rows.max()], [6 * scale, 14 * scale], atol=2 * scale)
    hottest = 255 * (OPACITY * np.array(colormaps[COLORS](1.0)[:3]) + (1 - OPACITY) * np.array([128 / 255] * 3))
    np.testing.assert_allclose(
        overlay(GREY, heat(10, 50)).getpixel((round(50 * scale), round(10 * scale))), hottest, atol=2
    )


def test_nothing_looked_at_is_the_picture_as_it_is():
    photo = picture(60, 40)
    for values in (np.zeros((40, 60)), np.full((40, 60), 1e-9, dtype=np.float32)):
        assert overlay(photo, values, peak=5.0).tobytes() == enlarge(photo).tobytes()
    assert overlay(photo, np.zeros((40, 60))).tobytes() == enlarge(photo).tobytes()


def test_more_heat_changes_more_of_the_picture():
    changes = [
        np.abs(np.asarray(overlay(GREY, np.full((40, 60), share), peak=1.0)).astype(int) - 128).mean()
        for share in (0.0, 0.1, 0.4, 1.0)
    ]
    assert changes[0] == 0 and changes == sorted(changes) and len({*changes}) == 4
    weak = np.full((40, 60), 0.01, dtype=np.float32)
    assert peak_of([weak, heat(10, 50)]) == LEAST_PEAK and peak_of([7 * heat(10, 50), weak]) == 7


@pytest.mark.parametrize("values", [np.zeros((60, 40)), np.full((40, 60), np.nan)])
def test_unfit_heat_is_refused(values):
    with pytest.raises(ValueError, match="picture of 40 x 60"):
        overlay(GREY, values)


def test_small_pictures_are_enlarged_and_large_ones_kept():
    assert max(enlarge(GREY).size) == SIDE
    assert enlarge(Image.new("L", (900, 20))).size == (900, 20)
    assert enlarge(Image.new("L", (900, 1)), 1000).size == (1000, 1)


@pytest.mark.parametrize("brightness", [0, 128, 255])
def test_the_outline_follows_the_masks_border_on_light_and_dark(brightness):
    plain = Image.new("RGB", (60, 40), (brightness,) * 3)
    drawn = outline(plain, mask(60, 40, (20, 10, 40, 30)))
    box = ImageChops.difference(drawn, enlarge(plain)).convert("L").point(lambda v: 255 if v else 0).getbbox()
    scale = drawn.width / 60
    np.testing.assert_allclose(box, [20 * scale, 10 * scale, 40 * scale, 30 * scale], atol=8)
    assert drawn.getpixel((round(30 * scale), round(20 * scale))) == (brightness,) * 3
    assert {(0, 0, 0), (255, 255, 255)} <= {color for _, color in drawn.getcolors()}


def test_phrases_have_lines_and_words_of_one_color_each():
    phrases = [("a red apple", mask(60, 40, (2, 2, 20, 30))), ("a tree", mask(60, 40, (30, 2, 50, 30)))]
    named = outline_phrases(GREY, phrases)
    height = enlarge(GREY).height
    assert named.size == (SIDE, height + 2 * 28)
    colors = [
        {color for _, color in named.crop((0, top, SIDE, end)).getcolors(1 << 20)} - {(255, 255, 255)}
        for top, end in ((0, height), (height, height + 28), (height + 28, height + 56))
    ]
    first, second = colors[0] & colors[1], colors[0] & colors[2]
    assert len(first) == len(second) == 1 and first != second


def test_panels_hold_every_picture_and_any_title():
    red, blue = Image.new("RGB", (30, 90), "red"), Image.new("RGB", (90, 30), "blue")
    sheet = panels(
        [[("first", red), ("a title far too long for its panel " * 4, blue)], [("", red)]], "Heading\nin two"
    )
    colors = {color for _, color in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
    assert sheet.width > 2 * 320 and sheet.height > 2 * 320


def test_rows_are_as_high_as_their_pictures_and_their_titles():
    wide = Image.new("RGB", (90, 30), "blue")
    low = panels([[("one", wide), ("two", wide)]], side=300)
    assert low.height < 100 + 60
    high = panels([[("one", wide), ("two words " * 12, wide)]], side=300)
    assert 15 < high.height - low.height < 100
    # Pictures of a row stand at one height, below the longest title, and nothing covers them.
    blue = np.asarray(high)[..., 2] - np.asarray(high)[..., 0].astype(int) == 255
    tops = [blue[:, GAP + column * (300 + GAP) :][:, :300].any(1).argmax() for column in range(2)]
    assert tops[0] == tops[1] and blue.sum() == 2 * 300 * 100


def test_lines_hold_the_whole_text_where_there_is_room():
    font, text = _font(15), "Is there a red apple in the image, left of Donaudampfschifffahrtsgesellschaft, Привет?"
    lines = _lines(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines) and len(lines) <= MOST_LINES
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = _lines(text * 4, font, 200)
    assert len(cut) == MOST_LINES and cut[-1].endswith("…") and font.getlength(cut[-1]) <= 200
    assert _lines(" \n ", font, 200) == []


def test_a_title_keeps_its_line_breaks():
    assert _lines("Q: What?\nA: A cat.", _font(15), 300) == ["Q: What?", "A: A cat."]


def test_the_scale_runs_from_nothing_to_the_hottest_color():
    sheet = panels([[("", GREY)]], side=200)
    scaled = panels([[("", GREY)]], side=200, peak=7.0)
    assert scaled.crop((0, 0, *sheet.size)).tobytes() == sheet.tobytes()
    below = np.asarray(scaled.crop((0, sheet.height, *scaled.size))).astype(int)
    hottest = Image.alpha_composite(Image.new("RGBA", (1, 1), "white"), heat_layer(np.ones((1, 1)), 1, (1, 1)))
    places = np.argwhere((np.abs(below - hottest.convert("RGB").getpixel((0, 0))) <= 1).all(-1))[:, 1]
    assert 40 < places.max() < 200
