"""Drawing: heat lies where it belongs, compared maps share a scale, outlines follow masks."""

import numpy as np
import pytest
from PIL import Image, ImageChops

from agevlm.analysis.drawing import GAP, MOST_LINES, SIDE, _font, _lines, enlarge, outline, overlay, panels
from builders import mask


GREY = Image.new("RGB", (60, 40), (128, 128, 128))


def heat(row: int, column: int) -> np.ndarray:
    values = np.zeros((40, 60), dtype=np.float32)
    values[row - 4 : row + 4, column - 4 : column + 4] = 1
    return values


def test_hot_is_red_and_cold_is_blue_at_the_right_place():
    drawn = overlay(GREY, heat(10, 50))
    scale = drawn.width / 60
    red, _, blue = drawn.getpixel((round(50 * scale), round(10 * scale)))
    assert red > blue
    red, _, blue = drawn.getpixel((round(10 * scale), round(30 * scale)))
    assert blue > red


def test_a_shared_peak_keeps_weak_maps_pale():
    strong, weak = heat(10, 50), np.full((40, 60), 0.01, dtype=np.float32)
    alone = overlay(GREY, weak)
    shared = overlay(GREY, weak, peak=float(strong.max()))
    red_alone, red_shared = (np.asarray(image)[..., 0].mean() for image in (alone, shared))
    assert red_alone > red_shared


def test_no_attention_at_all_is_drawn_cold():
    assert overlay(GREY, np.zeros((40, 60))).getpixel((5, 5)) == overlay(GREY, heat(10, 50)).getpixel((5, 290))


@pytest.mark.parametrize("values", [np.zeros((60, 40)), np.full((40, 60), np.nan)])
def test_unfit_heat_is_refused(values):
    with pytest.raises(ValueError, match="picture of 40 x 60"):
        overlay(GREY, values)


def test_small_pictures_are_enlarged_and_large_ones_kept():
    assert max(enlarge(GREY).size) == SIDE
    assert enlarge(Image.new("L", (900, 20))).size == (900, 20)


def test_the_outline_follows_the_masks_border():
    drawn = outline(GREY, mask(60, 40, (20, 10, 40, 30)))
    box = ImageChops.difference(drawn, enlarge(GREY)).convert("L").point(lambda v: 255 if v else 0).getbbox()
    scale = drawn.width / 60
    np.testing.assert_allclose(box, [20 * scale, 10 * scale, 40 * scale, 30 * scale], atol=8)
    assert drawn.getpixel((round(30 * scale), round(20 * scale))) == (128, 128, 128)


def test_panels_hold_every_picture_and_any_title():
    red, blue = Image.new("RGB", (30, 90), "red"), Image.new("RGB", (90, 30), "blue")
    sheet = panels(
        [[("first", red), ("a title far too long for its panel " * 4, blue)], [("", red)]], "Heading\nin two"
    )
    colours = {colour for _, colour in sheet.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
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


def test_the_scale_says_what_the_hottest_colour_is():
    sheet = panels([[("", GREY)]], side=200)
    scaled = panels([[("", GREY)]], side=200, peak=7.0)
    assert scaled.crop((0, 0, *sheet.size)).tobytes() == sheet.tobytes()
    below = np.asarray(scaled.crop((0, sheet.height, *scaled.size))).astype(int)
    ends = [np.argwhere((below == colour).all(-1))[:, 1] for colour in ((0, 0, 128), (128, 0, 0))]
    assert 0 < ends[0].max() < ends[1].min() < 200
