"""Masks: polygons of every kind, boxes, morphology, comparisons, COCO's run lengths."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from agevlm.grounding import masks


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
some_masks = arrays.arrays(bool, sizes)
numbers = st.floats(-200, 200) | st.sampled_from([float("nan"), float("inf"), -float("inf")])


@pytest.mark.parametrize(
    ("pieces", "box"),
    [
        ([], None),
        ([[]], None),
        ([[5, 5]], None),
        ([[5, 5, 20, 20]], None),  # two points
        ([[2, 3, 12, 3, 12, 13]], [2, 3, 12, 13]),
        ([[2, 3, 12, 3, 12, 13, 99]], [2, 3, 12, 13]),  # an odd number of coordinates
        ([[0, 0, 10, 10, 10, 0, 0, 10]], [0, 0, 10, 10]),  # self-crossing
        ([[-50, -50, 10, -50, 10, 8, -50, 8]], [0, 0, 10, 8]),  # partly outside
        ([[200, 200, 220, 200, 220, 220]], None),  # outside
        ([[1, 1, 4, 1, 4, 4], [20, 6, 28, 6, 28, 9]], [1, 1, 28, 9]),  # two pieces
        ([[1, 1, 4, 1], [20, 6, 28, 6, 28, 9]], [20, 6, 28, 9]),  # one of them without an inside
        ([[7, 7, 7, 7, 7, 7]], None),  # a point, three times
    ],
)
def test_polygons_of_every_kind_give_a_box_inside_the_picture_or_none(pieces, box):
    assert masks.polygon_box(pieces, (30, 20)) == box
    drawn = masks.draw_polygons(pieces, (30, 20))
    assert drawn.shape == (20, 30) and drawn.dtype == bool


@given(box=st.lists(numbers, min_size=4, max_size=4), size=sizes)
def test_a_clipped_box_is_inside_and_has_a_pixel(box, size):
    clipped = masks.clip_box(box, size)
    if clipped is not None:
        left, top, right, bottom = clipped
        assert left >= 0 and right - left >= 1 and right <= size[0]
        assert top >= 0 and bottom - top >= 1 and bottom <= size[1]


@given(mask=some_masks)
def test_the_box_around_a_mask_is_the_smallest(mask):
    box = masks.mask_box(mask)
    assert (box is None) == (not mask.any())
    if box is not None:
        left, top, right, bottom = map(int, box)
        inner = mask[top:bottom, left:right]
        assert inner.sum() == mask.sum()
        assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()


@given(mask=some_masks, radius=st.integers(0, 5))
def test_dilation_against_its_definition(mask, radius):
    expected = np.zeros_like(mask)
    for row, column in np.argwhere(mask):
        expected[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1] = True
    assert (masks.dilate(mask, radius) == expected).all()
    assert (masks.erode(~mask, radius) == ~expected).all()


@given(first=arrays.arrays(bool, (9, 7)), second=arrays.arrays(bool, (9, 7)))
def test_scores_are_symmetric_in_range_and_one_for_equals(first, second):
    for score in (masks.iou, masks.boundary_f):
        assert score(first, first) == 1
        assert 0 <= score(first, second) <= 1
        assert score(first, second) == pytest.approx(score(second, first))


def test_boundary_f_forgives_a_pixel_and_not_ten():
    mask = np.zeros((100, 100), dtype=bool)
    mask[30:60, 30:60] = True
    assert masks.boundary_f(mask, np.roll(mask, 1, 0)) == 1
    assert masks.boundary_f(mask, np.roll(mask, 10, 0)) < 0.7


@given(mask=some_masks)
def test_png_of_one_bit_gives_the_mask_back(mask):
    image = Image.open(io.BytesIO(masks.to_png(mask)["bytes"]))
    assert image.mode == "1"
    assert (np.array(image) == mask).all()


@settings(max_examples=50)
@given(mask=some_masks)
def test_run_lengths_give_the_mask_back(mask):
    pytest.importorskip("pycocotools", reason="needs the extra coco")
    size = mask.shape[::-1]
    rle = masks.to_rle(mask)
    assert rle["size"] == list(mask.shape) and isinstance(rle["counts"], str)
    assert (masks.from_segmentation(rle, size) == mask).all()
    # COCO's uncompressed form: columns first, zeros first.
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    assert (masks.from_segmentation({"size": list(mask.shape), "counts": counts}, size) == mask).all()


@pytest.mark.parametrize(
    ("segmentation", "told"),
    [
        ("x", "list of polygons"),
        ({"counts": [1]}, "list of polygons"),
        ({"size": [3, 3], "counts": [9]}, "3 x 3"),
        ({"size": [4, 5], "counts": [9]}, "add up"),
        ({"size": [4, 5], "counts": [-5, 25]}, "whole numbers"),
        ({"size": [4, 5], "counts": [0.5, 19.5]}, "whole numbers"),
        ({"size": [4, 5], "counts": 20}, "whole numbers"),
        ({"size": 4, "counts": [20]}, "height, width"),
        ({"size": [4, 5], "counts": "09"}, "add up to 9"),
        ({"size": [4, 5], "counts": "d"}, "end within a number"),
        ({"size": [4, 5], "counts": "0 1"}, "no run lengths"),
        ({"size": [4, 5], "counts": "\u00e9"}, "no run lengths"),
        ({"size": [4, 5], "counts": "o" * 40}, "no run lengths"),
        ([[1, 1], [4, 1], [4, 3]], "a list of points"),
        ([1, 1, 4, 1, 4, 3], "flat list of numbers"),
        ([[1, 1, 4, 1, 4, math.nan]], "flat list of numbers"),
        ([[{"x": 1, "y": 1}]], "flat list of numbers"),
        (None, "list of polygons"),
    ],
)
def test_a_segmentation_that_does_not_fit_is_refused(segmentation, told):
    with pytest.raises(ValueError, match=told):
        masks.from_segmentation(segmentation, (5, 4))
