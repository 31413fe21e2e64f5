"""Drawing: heat covers what is looked at and nothing else, outlines follow masks and stand out, sheets hold all."""

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageFilter

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
    hottest = 255 * (OPACITY * np.array(COLORS(1.0)[:3]) + (1 - OPACITY) * np.array([128 / 255] * 3))
    np.testing.assert_allclose(
        overlay(GREY, heat(10, 50)).getpixel((round(50 * scale), round(10 * scale))), hottest, atol=2
    )


def test_nothing_looked_at_is_the_picture_as_it_is():
    photo = picture(60, 40)
    for values in (np.zeros((40, 60)), np.full((40, 60), 1e-9, dtype=np.float32)):
        assert overlay(photo, values, peak=5.0).tobytes() == enlarge(photo).tobytes()
    assert overlay(photo, np.zeros((40, 60))).tobytes() == enlarge(photo).tobytes()


@pytest.mark.parametrize("color", [(217, 38, 41), (34, 150, 60), (40, 90, 220), (248, 220, 40), (255,) * 3, (0,) * 3])
def test_what_is_hardly_looked_at_keeps_its_color(color):
    """A twentieth of the hottest attention moves no channel far; the hottest is seen on every color."""
    plain = Image.new("RGB", (60, 40), color)
    faint, hot = (
        np.abs(np.asarray(overlay(plain, np.full((40, 60), share), peak=1.0)).astype(int) - color).max()
        for share in (0.05, 1.0)
    )
    assert 0 < faint <= 0.04 * 255 + 1 and hot >= 60


def test_more_heat_changes_more_of_the_picture():
    changes = [
        np.abs(np.asarray(overlay(GREY, np.full((40, 60), share), peak=1.0)).astype(int) - 128).mean()
        for share in (0.0, 0.1, 0.4, 1.0)
    ]
    assert changes[0] == 0 and changes == sorted(changes) and len({*changes}) == 4
    # From the first color to the last each is lighter than the one before, on any ground of one brightness.
    light = np.asarray(heat_layer(np.linspace(0.1, 1, 64)[None], 1, (64, 1)).convert("L")).astype(int)[0]
    assert (np.diff(light) >= 0).all() and light[-1] > light[0] + 100
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
    # All along the border, however light or dark the ground.
    seen = ImageChops.difference(drawn, enlarge(plain)).convert("L").point(lambda v: 255 if v >= 127 else 0)
    near = np.asarray(seen.filter(ImageFilter.MaxFilter(9))) > 0
    left, top, right, bottom = (round(side * scale) for side in (20, 10, 40, 30))
    assert near[top, left:right].all() and near[bottom, left:right].all()
    assert near[top:bottom, left].all() and near[top:bottom, right].all()


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
    scaled = panels([[("", GREY)]], side=200, peaks=[7.0])
    assert scaled.crop((0, 0, *sheet.size)).tobytes() == sheet.tobytes()
    below = np.asarray(scaled.crop((0, sheet.height, *scaled.size))).astype(int)
    hottest = Image.alpha_composite(Image.new("RGBA", (1, 1), "white"), heat_layer(np.ones((1, 1)), 1, (1, 1)))
    places = np.argwhere((np.abs(below - hottest.convert("RGB").getpixel((0, 0))) <= 1).all(-1))[:, 1]
    assert 40 < places.max() < 200


def test_rows_have_scales_of_their_own_or_one_for_all():
    rows = [[("", GREY)], [("", GREY)]]
    plain, one, each = (panels(rows, side=200, peaks=peaks) for peaks in ([], [7.0], [7.0, 9.0]))
    assert 0 < one.height - plain.height == each.height - one.height
    own, other = (panels(rows[:1], side=200, peaks=[peak]) for peak in (7.0, 9.0))
    assert each.crop((0, 0, *own.size)).tobytes() == own.tobytes()
    lowest = (0, own.height - 40, own.width, own.height)
    below = (0, each.height - 40, each.width, each.height)
    assert each.crop(below).tobytes() == other.crop(lowest).tobytes() != own.crop(lowest).tobytes()
