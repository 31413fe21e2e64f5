"""One geometry for pictures, masks and maps: against naive references, for any aspect ratio and any kind of file.

On the Pillow backend, which is there everywhere; `test_image_backends.py` holds the other one against it.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from agevlm.processing import AgeVlmImageProcessorPil
from agevlm.processing.image_processing_agevlm import GEOMETRIES, fit
from builders import picture


STRIDE = 32
SIZES = st.one_of(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(
        [(1, 1), (10, 20_000), (3, 2000), (2000, 3), (1, 257), (96, 96), (64, 96), (640, 480), (20_000, 10)]
    ),
)
CANVASES = st.sampled_from([(32, 32), (96, 96), (64, 128), (224, 224)])
QUICK = settings(max_examples=60, deadline=None, database=None)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def make(geometry: str = "pad", canvas: tuple[int, int] = (96, 96), **kwargs) -> AgeVlmImageProcessorPil:
    return AgeVlmImageProcessorPil(size={"height": canvas[0], "width": canvas[1]}, geometry=geometry, **kwargs)


@st.composite
def masks(draw, sizes=SIZES, smallest_only=False):
    """A mask with one to three set rectangles, or a single set pixel."""
    height, width = draw(sizes)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(1 if smallest_only else draw(st.integers(1, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom = top + 1 if smallest_only else draw(st.integers(top + 1, height))
        right = left + 1 if smallest_only else draw(st.integers(left + 1, width))
        mask[top:bottom, left:right] = True
    return mask


def naive_coverage(mask: np.ndarray, canvas: tuple[int, int], geometry: str) -> np.ndarray:
    """Share of each cell that is covered: every set pixel is a rectangle on the canvas, cut with every cell."""
    source, target = fit(mask.shape, canvas, geometry)

    def on_canvas(position: float, axis: int) -> float:
        scale = (target[axis + 2] - target[axis]) / (source[axis + 2] - source[axis])
        return min(max((position - source[axis]) * scale + target[axis], target[axis]), target[axis + 2])

    coverage = np.zeros((canvas[0] // STRIDE, canvas[1] // STRIDE))
    for y, x in zip(*np.nonzero(mask), strict=True):
        top, bottom, left, right = on_canvas(y, 1), on_canvas(y + 1, 1), on_canvas(x, 0), on_canvas(x + 1, 0)
        for row, column in np.ndindex(coverage.shape):
            high = min(bottom, (row + 1) * STRIDE) - max(top, row * STRIDE)
            wide = min(right, (column + 1) * STRIDE) - max(left, column * STRIDE)
            coverage[row, column] += max(high, 0) * max(wide, 0) / STRIDE**2
    return coverage


@geometries
@QUICK
@given(size=SIZES, canvas=CANVASES)
def test_fit_keeps_what_the_geometry_promises(geometry, size, canvas):
    (height, width), (canvas_height, canvas_width) = size, canvas
    source, target = fit(size, canvas, geometry)
    assert 0 <= source[0] < source[2] <= width and 0 <= source[1] < source[3] <= height
    assert 0 <= target[0] < target[2] <= canvas_width and 0 <= target[1] < target[3] <= canvas_height
    shown, area = (source[3] - source[1], source[2] - source[0]), (target[3] - target[1], target[2] - target[0])
    if geometry != "crop":
        assert source == (0, 0, width, height)
    if geometry != "pad":
        assert target == (0, 0, canvas_width, canvas_height)
    if geometry == "pad":
        scale = min(canvas_height / height, canvas_width / width)
        assert canvas_height == area[0] or canvas_width == area[1]
        assert all(abs(area[axis] - max(size[axis] * scale, 1)) <= 0.5 for axis in (0, 1))
        assert abs(target[0] - (canvas_width - target[2])) <= 1 and abs(target[1] - (canvas_height - target[3])) <= 1
    if geometry == "crop":
        scale = max(canvas_height / height, canvas_width / width)
        assert shown[0] == height or shown[1] == width
        # The aspect ratio of the canvas, to half a pixel of the picture
        assert all(abs(part - max(side / scale, 1)) <= 0.5 for part, side in zip(shown, canvas, strict=True))
        assert abs(source[0] - (width - source[2])) <= 1 and abs(source[1] - (height - source[3])) <= 1


@geometries
@settings(QUICK, max_examples=40)
@given(mask=masks(st.tuples(st.integers(1, 14), st.integers(1, 14))), canvas=st.sampled_from([(64, 64), (64, 128)]))
def test_cells_follow_the_half_rule_of_a_naive_reference(geometry, mask, canvas):
    coverage = naive_coverage(mask, canvas, geometry)
    cells = make(geometry, canvas).mask_to_grid(mask)
    assert cells.dtype == bool and cells.shape == coverage.shape
    if (coverage >= 0.5 + 1e-5).any():
        assert cells[coverage >= 0.5 + 1e-5].all()
        assert not cells[coverage < 0.5 - 1e-5].any()
    elif (coverage < 0.5 - 1e-5).all():
        assert cells.sum() == (coverage.max() > 1e-9)
        assert not cells.any() or coverage[cells][0] == pytest.approx(coverage.max(), abs=1e-6)


def test_a_cell_that_is_covered_by_exactly_one_half_counts():
    mask = np.zeros((96, 96), dtype=bool)
    mask[:, :16] = True
    assert make().mask_to_grid(mask).tolist() == [[True, False, False]] * 3
    mask[0, 0] = False
    assert make().mask_to_grid(mask).tolist() == [[False, False, False]] + [[True, False, False]] * 2


@geometries
@QUICK
@given(mask=masks(), canvas=CANVASES)
def test_no_cell_of_a_mask_lies_on_padding(geometry, mask, canvas):
    processor = make(geometry, canvas)
    shown = processor(Image.new("RGB", mask.shape[::-1]), return_tensors="np")["visual_token_mask"][0]
    assert shown.shape == (processor.grid[0] * processor.grid[1],) and shown.any()
    assert not (processor.mask_to_grid(mask).reshape(-1) & ~shown).any()


@pytest.mark.parametrize("geometry", ["pad", "stretch"])
@QUICK
@given(mask=masks(smallest_only=True), canvas=CANVASES)
@example(mask=np.arange(176)[None] == 16, canvas=(96, 96))  # a pixel centered on the border of two windows
def test_small_objects_never_vanish(geometry, mask, canvas):
    processor = make(geometry, canvas)
    assert processor.mask_to_grid(mask).sum() >= 1
    if min(mask.shape) > 3:  # smaller pictures have pixels larger than cells
        assert (naive_coverage(mask, canvas, geometry)[processor.mask_to_grid(mask)] > 0).all()


@pytest.mark.parametrize("width", [101, 104, 176, 208, 2000])
def test_no_pixel_is_lost_at_the_borders_of_resampling_windows(width):
    for column in range(width):
        assert make().mask_to_grid(np.arange(width)[None] == column).sum() == 1


@QUICK
@given(mask=masks(smallest_only=True), canvas=CANVASES)
def test_crop_loses_an_object_only_where_the_picture_is_cut(mask, canvas):
    cut_away = naive_coverage(mask, canvas, "crop").sum() < 1e-9
    assert make("crop", canvas).mask_to_grid(mask).any() == (not cut_away)


@geometries
@QUICK
@given(mask=masks(), canvas=CANVASES)
def test_a_mask_taken_to_the_grid_and_back_peaks_on_the_object(geometry, mask, canvas):
    processor = make(geometry, canvas)
    cells = processor.mask_to_grid(mask)
    back = processor.grid_to_pixels(cells.astype(float), mask.shape)
    assert back.shape == mask.shape and back.dtype == np.float32
    if not cells.any():
        assert geometry == "crop" and not back.any()
        return
    source, target = fit(mask.shape, canvas, geometry)
    cell = [STRIDE * (source[axis + 2] - source[axis]) / (target[axis + 2] - target[axis]) for axis in (1, 0)]
    y, x = np.unravel_index(back.argmax(), back.shape)
    ys, xs = np.nonzero(mask)
    # One cell, and one pixel because maps are drawn in whole pixels
    assert ((abs(ys - y) <= cell[0] + 1) & (abs(xs - x) <= cell[1] + 1)).any()


@geometries
@QUICK
@given(size=SIZES, canvas=CANVASES, seed=st.integers(0, 99))
def test_maps_stay_in_their_range_and_outside_the_crop_they_are_zero(geometry, size, canvas, seed):
    processor = make(geometry, canvas)
    values = np.random.default_rng(seed).uniform(0.5, 1, processor.grid)
    back = processor.grid_to_pixels(values, size)
    source, _ = fit(size, canvas, geometry)
    outside = np.ones(size, dtype=bool)
    outside[source[1] : source[3], source[0] : source[2]] = False
    assert not back[outside].any()
    shown = back[back > 0]
    assert len(shown) and shown.min() >= values.min() - 1e-5 and shown.max() <= values.max() + 1e-5
    constant = processor.grid_to_pixels(np.full(processor.grid, 0.25), size)
    assert np.isin(constant, [0, np.float32(0.25)]).all() and (geometry == "crop" or constant.all())


@geometries
@pytest.mark.parametrize("size", [(96, 96), (96, 192), (192, 96), (300, 130), (97, 400)])
def test_maps_are_interpolated_between_the_centers_of_their_cells(geometry, size):
    processor = make(geometry)
    values = np.random.default_rng(0).random(processor.grid)
    source, target = fit(size, (96, 96), geometry)

    def along(axis: int) -> np.ndarray:
        """For each pixel of the picture, the share that each cell has in it: `(pixels, cells)`."""
        scale = (target[axis + 2] - target[axis]) / (source[axis + 2] - source[axis])
        centers = (np.arange(size[1 - axis]) + 0.5 - source[axis]) * scale + target[axis]
        distance = np.abs(centers[:, None] / STRIDE - 0.5 - np.arange(3))
        distance[centers < STRIDE / 2] = np.arange(3)
        distance[centers > 96 - STRIDE / 2] = np.arange(2, -1, -1)
        return (1 - distance).clip(0)

    back = processor.grid_to_pixels(values, size)
    left, top, right, bottom = source
    shown = np.s_[top:bottom, left:right]
    # A pixel of the canvas is 1 / 32 of the way from one cell to the next.
    np.testing.assert_allclose(back[shown], (along(1) @ values @ along(0).T)[shown], atol=1.5 / STRIDE)


def test_masks_that_mark_nothing_or_have_channels_are_refused():
    with pytest.raises(ValueError, match=r"mask is empty.*unguided"):
        make().mask_to_grid(Image.new("1", (9, 9)))
    with pytest.raises(ValueError, match=r"shape \(height, width\), got \(9, 9, 3\)"):
        make().mask_to_grid(Image.new("RGB", (9, 9), "white"))


def plain(rgb: Image.Image) -> np.ndarray:
    """(x / 255 - mean) / std, channels first."""
    processor = make()
    values = (np.asarray(rgb, dtype=np.float64) / 255 - processor.image_mean) / processor.image_std
    return values.transpose(2, 0, 1)


def pixels(image, geometry: str = "pad", **kwargs) -> np.ndarray:
    return make(geometry)(image, return_tensors="np", **kwargs)["pixel_values"][0]


@geometries
def test_a_picture_of_the_target_size_is_not_resampled(geometry):
    image = picture(96, 96)
    values = pixels(image, geometry)
    assert values.dtype == np.float32 and values.shape == (3, 96, 96)
    np.testing.assert_allclose(values, plain(image), atol=1e-6)
    # The way through the resampler gives the same: a window of a larger picture, scaled by 1.
    larger = Image.new("RGB", (110, 110))
    larger.paste(image, (7, 7))
    again = larger.resize((96, 96), Image.Resampling.BICUBIC, box=(7, 7, 103, 103))
    np.testing.assert_array_equal(values, pixels(again, geometry))


def test_crop_shows_the_center():
    image = picture(192, 96)
    np.testing.assert_allclose(pixels(image, "crop"), plain(image.crop((48, 0, 144, 96))), atol=1e-6)
    assert make("crop")(image)["visual_token_mask"].all()


@pytest.mark.parametrize(("width", "height"), [(50, 30), (200, 31), (20, 33), (2000, 3)])
def test_other_sizes_are_resampled_bicubically_into_their_place(width, height):
    image = picture(width, height)
    resized = image.resize((96, 96), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(pixels(image, "stretch"), plain(resized), atol=1e-6)
    _, (left, top, right, bottom) = fit((height, width), (96, 96), "pad")
    resized = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    values = pixels(image, "pad")
    np.testing.assert_allclose(values[:, top:bottom, left:right], plain(resized), atol=1e-6)
    padding = np.ones((96, 96), dtype=bool)
    padding[top:bottom, left:right] = False
    # CLIP's mean color in whole steps of 1 / 255
    assert padding.any() and np.abs(values[:, padding]).max() < 1 / 255 / min(make().image_std)


@geometries
@QUICK
@given(size=SIZES, canvas=CANVASES)
def test_visible_cells_are_those_that_hold_a_pixel_of_the_picture(geometry, size, canvas):
    """A white picture is nowhere of the background's color."""
    processor = make(geometry, canvas)
    batch = processor(Image.new("RGB", size[::-1], "white"), return_tensors="np", do_normalize=False)
    white = (batch["pixel_values"][0] == 1).all(0)
    rows, columns = processor.grid
    cells = white.reshape(rows, STRIDE, columns, STRIDE).any((1, 3))
    np.testing.assert_array_equal(batch["visual_token_mask"][0], cells.reshape(-1))


def gray(value: int) -> Image.Image:
    return Image.new("RGB", (5, 5), (value, value, value))


def with_transparency(mode: str) -> Image.Image:
    """Half transparent red; for palettes, index 1 is transparent altogether."""
    if mode == "P":
        image = Image.new("P", (5, 5), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.info["transparency"] = 1
        return image
    return Image.new("RGBA", (5, 5), (255, 0, 0, 128)).convert(mode)


MODES = {
    "L": (Image.new("L", (5, 5), 77), gray(77)),
    "LA": (Image.new("LA", (5, 5), (100, 51)), gray(224)),  # 255 + (100 - 255) * 51 / 255
    "RGBA": (with_transparency("RGBA"), Image.new("RGB", (5, 5), (255, 127, 127))),
    "P": (with_transparency("P"), gray(255)),
    "P without transparency": (gray(0).convert("P"), gray(0)),
    "CMYK": (Image.new("CMYK", (5, 5), (255, 0, 0, 0)), Image.new("RGB", (5, 5), (0, 255, 255))),
    "I;16": (Image.fromarray(np.full((5, 5), 0x8123, dtype=np.uint16)), gray(0x81)),
    "1": (Image.new("1", (5, 5), 1), gray(255)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("from_file", [False, True])
def test_every_mode_becomes_the_rgb_picture_it_shows(mode, from_file, tmp_path):
    image, expected = MODES[mode]
    assert image.mode == mode.split()[0]
    if from_file:
        path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
        image.save(path)
        image = str(path)
    np.testing.assert_array_equal(pixels(image), pixels(expected))


@pytest.mark.parametrize("from_file", [False, True])
def test_rotation_tags_are_applied(from_file, tmp_path):
    upright, path = picture(40, 20), tmp_path / "rotated.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert Image.open(path).size == (20, 40)
    np.testing.assert_array_equal(pixels(str(path) if from_file else Image.open(path)), pixels(upright))


@pytest.mark.parametrize("size", [(96, 96), (1, 40), (40, 1), (1, 1)])
def test_arrays_equal_pictures(size):
    image = picture(*size)
    array, expected = np.asarray(image), pixels(image)
    channels_first = np.moveaxis(array, -1, 0)
    np.testing.assert_array_equal(pixels(channels_first, input_data_format="channels_first"), expected)
    np.testing.assert_array_equal(pixels(array, input_data_format="channels_last"), expected)
    np.testing.assert_array_equal(pixels(torch.tensor(channels_first), input_data_format="channels_first"), expected)
    np.testing.assert_array_equal(pixels(channels_first / 255, input_data_format="channels_first"), expected)
    gray_array = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(
        pixels(gray_array[None], input_data_format="channels_first"), pixels(image.convert("L"))
    )
    with pytest.raises(ValueError, match=r"float64 with `do_rescale=False`. Leave"):
        pixels(channels_first / 255, input_data_format="channels_first", do_rescale=False)


def test_switches_leave_their_step_out():
    image = picture(96, 96)
    raw = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(image, do_rescale=False, do_normalize=False), raw)
    np.testing.assert_allclose(pixels(image, do_normalize=False), raw / 255, atol=1e-7)


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    bomb, path = Image.new("1", (10_000, 9_000)), tmp_path / "bomb.png"
    bomb.save(path)
    with pytest.raises(ValueError, match=r"10000 x 9000 pixels is over the limit of 89,478,485 pixels. Scale it down"):
        make()(bomb)
    assert make(max_pixels=100)(Image.new("1", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # Pillow refuses twice as many already when opening
    with pytest.raises(ValueError, match=r"bomb\.png cannot be opened: .*decompression bomb"):
        make()(str(path))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="must be one of pad, stretch, crop, got 'fill'"):
        fit((2, 2), (32, 32), "fill")
    with pytest.raises(Exception, match="geometry"):
        make()(picture(), geometry="fill")


def test_saving_keeps_every_attribute(tmp_path):
    processor = make(
        "crop", (64, 128), cell_size=16, max_pixels=50_000, resample=2, image_mean=[0.5, 0.4, 0.3], do_normalize=False
    )
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert isinstance(again, AgeVlmImageProcessorPil)
    assert again.to_dict() == processor.to_dict()
    assert (again.geometry, again.cell_size, again.grid, again.max_pixels) == ("crop", 16, (4, 8), 50_000)
    image = picture(70, 50)
    before, after = processor(image), again(image)
    for name in ("pixel_values", "visual_token_mask"):
        np.testing.assert_array_equal(before[name], after[name])
