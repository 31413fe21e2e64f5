"""Visual tokens on the picture's pixels: against our processor's own geometry, and against what towers really see."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm.analysis.cells import Cells, View, _grid, agevlm_view, cells_of, measured_boxes
from agevlm.analysis.subjects import Subject
from builders import picture, tiny_processor
from vlms import EVERY


SIZES = st.tuples(st.integers(20, 150), st.integers(20, 150))


@pytest.mark.parametrize("geometry", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(96, 96), (60, 150), (200, 70)])
def test_what_is_measured_is_what_our_processor_says(geometry, size):
    processor = tiny_processor(geometry=geometry)
    (measured,) = measured_boxes(Subject(None, processor), size, 1)
    said = agevlm_view(processor.image_processor, size).box
    np.testing.assert_allclose(measured, said, atol=0.01 * max(said[2] - said[0], said[3] - said[1]))


@given(SIZES, st.sampled_from(["pad", "stretch", "crop"]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_masks_fall_on_the_cells_that_our_processor_says(size, geometry, seed):
    generator = np.random.default_rng(seed)
    (y0, y1), (x0, x1) = (sorted(generator.integers(0, length + 1, 2)) for length in size)
    mask = np.zeros(size, dtype=bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    if not mask.any():
        mask[0, 0] = True
    images = tiny_processor(geometry=geometry).image_processor
    cells = Cells(size, (agevlm_view(images, size),))
    coverage = np.sort(cells.coverage(mask))
    if abs(coverage - 0.5).min() > 1e-4 and coverage[-1] - coverage[-2] > 1e-4:  # no tie that rounding decides
        np.testing.assert_array_equal(cells.inside(mask), images.mask_to_grid(mask).reshape(-1))


@given(SIZES, st.sampled_from(["pad", "stretch", "crop"]))
@settings(max_examples=20, deadline=None)
def test_an_even_spread_is_one_everywhere(size, geometry):
    cells = Cells(size, (agevlm_view(tiny_processor(geometry=geometry).image_processor, size),))
    left, top, right, bottom = cells.views[0].box
    even = np.full(cells.count, 1 / cells.count)
    spread = (right - left) * (bottom - top) / (size[0] * size[1])  # of the attention's area over the picture's
    seen = cells.to_pixels(even)
    np.testing.assert_allclose(seen[seen > 0], 1 / spread, rtol=1e-3)
    if geometry != "crop":
        assert (seen > 0).all()
    assert cells.coverage(np.ones(size)).sum() == pytest.approx(cells.count * min(1, 1 / spread), rel=0.02)


def test_shrunk_cells_are_on_the_same_parts_of_the_picture():
    """A map on the small picture is the map of the large one, seen from afar."""
    views = (View(3, 4, (0, 0, 400, 200)), View(2, 2, (-50.0, 40.0, 250.0, 340.0)))
    cells = Cells((200, 400), views)
    small = cells.shrunk(100)
    assert small.size == (50, 100)
    np.testing.assert_allclose(small.coverage(np.ones((50, 100))), cells.coverage(np.ones((200, 400))), atol=0.02)
    weights = np.random.default_rng(0).random(cells.count).astype(np.float32)
    afar = cells.to_pixels(weights).reshape(50, 4, 100, 4).mean((1, 3))
    inner = (slice(1, -1), slice(1, -1))
    border = 0.15 * afar.max()  # a view's border, and the folds of the interpolation, lie within small pixels
    np.testing.assert_allclose(small.to_pixels(weights)[inner], afar[inner], atol=border)
    assert np.median(np.abs(small.to_pixels(weights) - afar)) < 0.01 * afar.max()
    assert cells.shrunk(400) == cells


def test_views_add_up():
    whole, tile = View(1, 2, (0, 0, 8, 4)), View(1, 1, (4, 0, 8, 4))
    cells = Cells((4, 8), (whole, tile))
    pixels = cells.to_pixels(np.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(pixels[:, 0], 1.0)
    np.testing.assert_allclose(pixels[:, -1], 0.5 + 0.5)
    assert cells.inside(np.arange(8)[None].repeat(4, 0) >= 4).tolist() == [False, True, True]


def _features(subject: Subject, image: Image.Image) -> tuple[torch.Tensor, object]:
    encoded = subject.encode([image], ["What is it?"])
    inputs = {key: value for key, value in encoded.inputs.items() if key.startswith(("pixel", "image_grid"))}
    with torch.no_grad():
        output = subject.model.base_model.get_image_features(**inputs, return_dict=True).pooler_output
    output = torch.cat(list(output)) if isinstance(output, (tuple, list)) else output
    return output.reshape(-1, output.shape[-1]), encoded


def _make_local(model: torch.nn.Module) -> None:
    """Every visual token of the tower sees its own pixels alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name or "lm_head" in name:
                continue
            if ".out_proj." in name or ".attn.proj." in name:  # of the tower's attention
                parameter.zero_()
            if ".dwconv.weight" in name:
                centre = parameter[..., 3, 3].clone()
                parameter.zero_()
                parameter[..., 3, 3] = centre
            if name.endswith("layer_scale_parameter"):
                parameter.fill_(1)


@pytest.mark.parametrize("name", EVERY)
def test_a_token_changes_with_the_pixels_of_its_cell(name):
    """Independent of how the cells were found: paint over a place, and see which tokens of the tower notice."""
    subject = EVERY[name]()
    _make_local(subject.model)
    image = picture(100, 60)
    before, encoded = _features(subject, image)
    cells = cells_of(subject, image, encoded)
    assert before.shape[0] == cells.count
    for x, y in ((30, 8), (59, 42), (70, 52), (38, 20)):
        painted = image.copy()
        box = (x - 3, y - 3, x + 3, y + 3)
        painted.paste((255, 0, 0), box)
        mask = np.zeros((60, 100), dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        change = (_features(subject, painted)[0] - before).abs().sum(-1).numpy()
        start = 0
        for view in cells.views:
            part = slice(start, start := start + view.rows * view.columns)
            coverage = cells.coverage(mask)[part]
            if coverage.max() == 0:
                assert change[part].max() < 0.05 * change.max()
            elif np.partition(coverage, -2)[-2] == 0 or coverage.max() > 3 * np.partition(coverage, -2)[-2]:
                assert change[part].argmax() == coverage.argmax(), (x, y, view)


def test_tokens_without_a_place_are_refused():
    for count, tiles, size in ((10, 1, (24, 24)), (17, 5, (32, 32)), (8, 1, (24, 24))):
        with pytest.raises(ValueError, match="are no grid on"):
            _grid(count, tiles, *size)
    assert _grid(12, 1, 24, 32) == (3, 4)


def test_an_unknown_layout_is_refused():
    subject = EVERY["llava"]()
    encoded = subject.encode([picture()], ["What?"])
    subject.model.config = type("Other", (), {"model_type": "other", "image_token_id": 1})()
    with pytest.raises(ValueError, match="'other' model lie on the picture is not known"):
        cells_of(subject, picture(), encoded)


def test_a_turned_canvas_is_refused():
    class Turned:
        def __call__(self, images, return_tensors):
            pixels = torch.from_numpy(np.asarray(images[0][0]).copy()).permute(2, 1, 0).float()
            return {"pixel_values": pixels[None]}

    subject = Subject(None, type("Processor", (), {"image_processor": Turned()})())
    with pytest.raises(ValueError, match="does not lay the picture straight"):
        measured_boxes(subject, (40, 40), 1)
