"""Grounding: a model that is made to look at a known cell scores what it must, in every geometry."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agevlm.data.rows import MASK_FEATURES, PHRASE_FEATURES, ROW_FEATURES, content_digest, undecoded
from agevlm.evaluation.cli import evaluate as main
from agevlm.evaluation.inputs import PICTURES
from agevlm.evaluation.looking import center_prior, load_masked, mass_and_pointing, measure_looking
from agevlm.evaluation.run import rows_digest
from builders import stored, tiny_processor


# A picture of 192 x 96 on a canvas of 96 x 96 with 3 x 3 cells, and the box of the picture that fills one cell.
WIDTH, HEIGHT = 192, 96
CELLS = {
    "stretch": ((0, 0, 64, 32), (0, 0)),
    "crop": ((48, 0, 80, 32), (0, 0)),
    "pad": ((64, 16, 128, 80), (1, 1)),
}


class Looking:
    """Stands in for a model: every layer looks at the given grid, whatever it is asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, *grids: np.ndarray):
        self.grids = [torch.tensor(grid, dtype=torch.float32).flatten() for grid in grids]
        self.config = SimpleNamespace(cross_attention_layers=list(range(len(grids))))
        self.batches: list[dict] = []

    def base_model(self, **batch):
        self.batches.append(batch)
        shape = batch["guidance_query_mask"].shape[:2]
        return SimpleNamespace(cross_attention_maps=torch.stack([grid.expand(*shape, -1) for grid in self.grids]))


def box_mask(box, size=(WIDTH, HEIGHT)) -> Image.Image:
    mask = Image.new("1", size)
    mask.paste(1, box)
    return mask


def rows(*masks: Image.Image | None) -> Dataset:
    data = {
        "id": [f"row-{index}" for index in range(len(masks))],
        "image": [stored(Image.new("RGB", (WIDTH, HEIGHT), "grey")) for _ in masks],
        "mask": [None if mask is None else stored(mask) for mask in masks],
        "question": ["Is there a red apple in the image?"] * len(masks),
        "answer": ["yes"] * len(masks),
        "category": ["random"] * len(masks),
    }
    return undecoded(Dataset.from_dict(data).cast_column("image", ImageFeature()).cast_column("mask", ImageFeature()))


def at(row: int, column: int) -> np.ndarray:
    grid = np.zeros((3, 3))
    grid[row, column] = 1
    return grid


def measure(model, data, geometry="pad", **settings):
    processor = tiny_processor(geometry=geometry)
    return measure_looking(model, processor, data, progress=False, **settings)


@pytest.mark.parametrize("geometry", CELLS)
def test_looking_at_the_mask_and_beside_it(geometry):
    box, cell = CELLS[geometry]
    beside = (2 - cell[0], 2) if geometry != "pad" else (1, 2)
    metrics, records = measure(Looking(at(*cell), at(*beside)), rows(box_mask(box)), geometry)
    assert metrics["in_mask_mass"] == {"mean": 0.5, "per_layer": [1, 0]}
    assert metrics["pointing_accuracy"] == {"mean": 0.5, "per_layer": [1, 0]}
    assert metrics["layers"] == [0, 1] and metrics["n"] == 1 and metrics["skipped"] == 0
    assert records[0]["id"] == "row-0"


@pytest.mark.parametrize("geometry", CELLS)
def test_looking_everywhere_equals_the_uniform_baseline(geometry):
    box, _ = CELLS[geometry]
    metrics, _ = measure(Looking(np.full((3, 3), 1 / 9)), rows(box_mask(box)), geometry)
    # The picture reaches into all 9 cells in every geometry: under `pad` it covers canvas rows 24 to 72.
    assert metrics["uniform"]["in_mask_mass"] == pytest.approx(1 / 9)
    assert metrics["in_mask_mass"]["mean"] == pytest.approx(metrics["uniform"]["in_mask_mass"])
    assert metrics["mass_over_uniform"] == pytest.approx(1)


def test_padding_is_no_part_of_the_uniform_baseline():
    """192 x 32 on the canvas is 96 x 16 in the middle row of cells: 3 cells show picture."""
    data = rows(box_mask((0, 0, 64, 32), size=(192, 32)))
    data = data.remove_columns("image").add_column("image", [stored(Image.new("RGB", (192, 32)))])
    metrics, _ = measure(Looking(at(1, 0)), data.cast_column("image", ImageFeature(decode=False)))
    assert metrics["uniform"] == pytest.approx({"in_mask_mass": 1 / 3, "pointing_accuracy": 1 / 3, "token_auroc": 0.5})
    assert metrics["in_mask_mass"]["mean"] == 1


def test_what_the_crop_cuts_away_is_skipped():
    data = rows(box_mask((0, 0, 40, 40)), box_mask(CELLS["crop"][0]), None)
    metrics, records = measure(Looking(at(0, 0)), data, "crop")
    assert (metrics["n"], metrics["skipped"]) == (1, 1)
    assert [record["id"] for record in records] == ["row-1"]
    with pytest.raises(ValueError, match="row row-0, field mask"):
        measure(Looking(at(0, 0)), data, "crop", strict=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (box_mask((0, 0, 4, 4), size=(96, 96)), "96 x 96 but the picture is 192 x 96"),
        (box_mask((0, 0, 0, 0)), "no pixel"),
    ],
)
def test_bad_masks_are_counted_or_stop(mask, message):
    data = rows(box_mask(CELLS["pad"][0]), mask)
    metrics, _ = measure(Looking(at(1, 1)), data)
    assert (metrics["n"], metrics["skipped"]) == (1, 1)
    with pytest.raises(ValueError, match=f"row row-1, field mask.*{message}"):
        measure(Looking(at(1, 1)), data, strict=True)


def grounded(folder, *phrases):
    """Rows a, b and c, c of two pictures, joined with masks (id, words, which of them, mask); None: one mask a row."""
    caption = "A cup, a red apple and a cup."
    items = [
        {
            "id": name,
            "images": [stored(Image.new("RGB", (WIDTH, HEIGHT), "grey"))] * len(pictures),
            "messages": [
                {"role": "user", "content": "".join(pictures) + "What is there?"},
                {"role": "assistant", "content": caption},
            ],
        }
        for name, pictures in (("a", ["<|image|>"]), ("b", ["<|image|>"]), ("c", ["<|image|>"] * 2))
    ]
    masks = [
        {"id": name, "query": words, "message_index": 1, "mask": stored(mask), "source": "x", "score": 1.0}
        | ({} if which is None else {"occurrence": which})
        for name, words, which, mask in phrases
    ]
    Dataset.from_list(items, ROW_FEATURES).to_parquet(folder / "rows.parquet")
    features = MASK_FEATURES if phrases[0][2] is None else PHRASE_FEATURES
    Dataset.from_list(masks, features).to_parquet(folder / "masks.parquet")
    return load_masked(folder / "masks.parquet", folder / "rows.parquet")


def test_a_row_is_the_mean_of_its_phrases(tmp_path):
    (box, cell), beside = CELLS["pad"], (0, 16, 64, 80)
    phrases = [("a", "cup", 1, box_mask(box)), ("a", "red apple", 0, box_mask(beside)), ("b", "cup", 0, box_mask(box))]
    data = grounded(tmp_path, *phrases)
    assert data["id"] == ["a", "b"]
    model = Looking(at(*cell))
    metrics, records = measure(model, data)
    assert [record["in_mask_mass"] for record in records] == [[0.5], [1]]
    assert metrics["in_mask_mass"]["mean"] == metrics["pointing_accuracy"]["mean"] == 0.75
    # The middle cell beats all; the cell beside it loses to that one and draws with seven (ties count half)
    assert records[0]["token_auroc"] == [(1 + 7 / 2 / 8) / 2] and records[1]["token_auroc"] == [1]
    ids, query = model.batches[0]["input_ids"], model.batches[0]["guidance_query_mask"]
    words = [
        [tiny_processor().tokenizer.decode(ids[row][query[row, place]]).strip() for place in (0, 1)] for row in (0, 1)
    ]
    assert words == [["cup", "red apple"], ["cup", ""]]
    assert query[0, 0].nonzero().min() > query[0, 1].nonzero().max(), "the second cup is meant"

    # One phrase a row gives what a mask of the whole text gives; other masks are another run
    alone = grounded(tmp_path, *[(name, words, None, mask) for name, words, _, mask in phrases[1:]])
    _, whole = measure(model, alone)
    assert whole[1] == records[1] and rows_digest(alone) == rows_digest(data)
    assert content_digest(alone, PICTURES) != content_digest(data, PICTURES)


def test_rows_that_phrases_cannot_be_measured_on(tmp_path):
    mask = box_mask(CELLS["pad"][0])
    data = grounded(tmp_path, ("b", "cup", 0, mask), ("c", "cup", 0, mask))
    metrics, records = measure(Looking(at(1, 1)), data)
    assert [record["id"] for record in records] == ["b"] and metrics["skipped"] == 1
    with pytest.raises(ValueError, match="row c: 2 pictures"):
        measure(Looking(at(1, 1)), data, strict=True)
    absent = grounded(tmp_path, ("a", "cup", 2, mask))
    with pytest.raises(ValueError, match=r"row \(id 'a'\): guidance\[0\].query 'cup' is not in .* 3 times"):
        measure(Looking(at(1, 1)), absent, strict=True)


def test_rows_of_masks_need_the_masks(tmp_path):
    with pytest.raises(ValueError, match="--rows are those of --masks; give the masks too"):
        main(["model", "--language", "text", "--rows", "rows", "--output", str(tmp_path)])


def test_rows_without_masks_measure_nothing():
    metrics, records = measure(Looking(at(1, 1)), rows(None, None))
    assert (metrics["n"], records) == (0, [])
    metrics, records = measure(Looking(at(1, 1)), rows(None).remove_columns("mask"))
    assert (metrics["n"], records) == (0, [])


def test_only_the_questions_tokens_are_asked_for():
    model = Looking(at(1, 1))
    measure(model, rows(box_mask(CELLS["pad"][0])))
    batch = model.batches[0]
    chosen = tiny_processor().tokenizer.decode(batch["input_ids"][0][batch["guidance_query_mask"][0, 0]])
    assert chosen == "Is there a red apple in the image?"


def test_the_models_own_maps_are_read(model, processor):
    """The metric equals one computed by hand from eager attention weights."""
    mask = box_mask((0, 0, 96, 96))
    metrics, _ = measure_looking(model, processor, rows(mask), progress=False)
    model.set_attn_implementation("eager")
    batch = Looking(at(0, 0))
    measure(batch, rows(mask))
    inputs = batch.batches[0]
    chosen = inputs.pop("guidance_query_mask")[0, 0]
    with torch.no_grad():
        weights = model.base_model(**inputs, output_attentions=True).cross_attentions
    cells = processor.image_processor.mask_to_grid(mask).reshape(-1)
    expected = [layer[0][:, chosen][..., cells].sum(-1).mean().item() for layer in weights]
    assert metrics["in_mask_mass"]["per_layer"] == pytest.approx(expected, rel=1e-5)


def test_center_prior_is_a_symmetric_distribution_on_the_visible_cells():
    visible = np.zeros((6, 6), dtype=bool)
    visible[1:5] = True
    prior = center_prior(visible)
    assert prior.sum() == pytest.approx(1)
    assert not prior[~visible].any()
    np.testing.assert_allclose(prior, prior[::-1, ::-1])
    assert prior[2, 2] == prior.max() > prior[1, 0]


@given(st.lists(st.floats(0, 1), min_size=9, max_size=9), st.lists(st.booleans(), min_size=9, max_size=9))
def test_mass_is_a_share_and_splits_between_mask_and_rest(weights, inside):
    maps, mask = np.array(weights), np.array(inside)
    mass, pointing = mass_and_pointing(maps, mask)
    rest, pointing_rest = mass_and_pointing(maps, ~mask)
    if maps.sum() > 0:
        assert 0 <= mass <= 1 + 1e-12
        assert mass + rest == pytest.approx(1)
        assert pointing != pointing_rest
    else:
        assert not (mass or rest or pointing or pointing_rest)


def test_a_folder_in_place_of_a_file_of_masks_is_named(tmp_path):
    with pytest.raises(ValueError, match="is no file; give a Parquet file of image, question, mask, or --rows"):
        load_masked(tmp_path)
