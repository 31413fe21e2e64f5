"""Every backend's whole chain on the real classes with tiny random weights: batches equal rows one by one, texts over
the limit and answers without a region are told, and folders, bytes and boxes come out as they should."""

import functools
import re

import builders_grounding as tiny
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.utils import is_torchvision_available

from agevlm.data.rows import ROW_FEATURES
from agevlm.grounding.backends import TwoSteps, load_backend
from agevlm.grounding.choices import GROUNDERS, Published, names
from agevlm.grounding.filters import Filters
from agevlm.grounding.models import MAX_BOXES, PHRASES_TASK, SEGMENTATION_TASK, Florence2, Sam
from agevlm.grounding.output import read_masks
from agevlm.grounding.regions import Grounding
from agevlm.grounding.runner import ground
from agevlm.processing import AgeVlmImageProcessorPil


TEXTS = ["a red apple", "a blue car on the left of a green tree", "yes", "is there a green tree in the image?"]
MODELS = [name for name in names() if name != "exact"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A part's folder by the name of its builder, made when it is asked for."""
    root = tmp_path_factory.mktemp("grounding")

    @functools.cache
    def make(name):
        if name in ("sam2", "sam3") and not is_torchvision_available():
            pytest.skip(f"transformers' processor of {name} needs torchvision (extra ground)")
        return str(getattr(tiny, name)(root / name))

    return make


def backend_of(name, folders):
    if name == "sam3":
        return load_backend(name, segmenter=folders("sam3"))
    grounder = folders("grounding_dino" if name.startswith("grounding-dino") else "florence2")
    segmenter = folders(name.split("+")[1])
    return load_backend(name, grounder=grounder, segmenter=segmenter, max_new_tokens=24)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_rows_one_by_one(name, folders):
    backend = backend_of(name, folders)
    images, ids = tiny.pictures(4), list("abcd")
    together = backend(images, TEXTS, ids)
    assert any(result.mask is not None for result in together)
    for image, text, row_id, result in zip(images, TEXTS, ids, together, strict=True):
        (alone,) = backend([image], [text], [row_id])
        assert result.outcome == alone.outcome
        np.testing.assert_allclose(result.boxes, alone.boxes, atol=1e-3)
        if result.mask is None:
            assert alone.mask is None
            continue
        assert result.mask.shape == (image.height, image.width) and result.mask.dtype == bool
        assert (result.mask != alone.mask).mean() < 0.001  # a logit at the threshold may fall to either side
        assert result.score == pytest.approx(alone.score, abs=1e-5)
        for left, top, right, bottom in result.boxes:
            assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_chain_loses_no_row(name, folders, tmp_path):
    too_long = " ".join(["a red apple"] * 200)
    texts = [*TEXTS[:3], too_long, "tree. car. apple", "<loc_1> <OD> <image>"]
    rows = Dataset.from_list(
        [
            {
                "id": f"r{number}",
                "images": [image],
                "messages": [
                    {"role": "user", "content": "<|image|>What?"},
                    {"role": "assistant", "content": text},
                ],
            }
            for number, (text, image) in enumerate(zip(texts, tiny.pictures(6), strict=True))
        ],
        features=ROW_FEATURES,
    )
    backend = backend_of(name, folders)
    filters = Filters(min_area=0, max_area=1, min_score=-1, min_cells=0)  # random weights score around 0
    for out, batch_size in (("one", 1), ("all", 6)):
        summary = ground(
            rows,
            tmp_path / out,
            lambda: backend,
            backend_name=name,
            grid=AgeVlmImageProcessorPil(),
            filters=filters,
            batch_size=batch_size,
            num_workers=1 if batch_size > 1 else 0,
            progress=False,
        )
        assert summary["attempted"] == 6 and summary["kept"] >= 3
        rejected = read_masks(tmp_path / out, "rejected")
        assert dict(zip(rejected["id"], rejected["status"], strict=True))["r3"] == "text_too_long"
        assert "error" not in summary["status"]
    one, together = read_masks(tmp_path / "one"), read_masks(tmp_path / "all")
    assert one["id"] == together["id"]
    for first, second in zip(one, together, strict=True):
        assert (np.array(first["mask"]) != np.array(second["mask"])).mean() < 0.001
    assert {revision["commit"] for revision in one[0]["revisions"]} == {None}


def test_grounding_dino_tells_the_words_of_every_box(folders):
    backend, images = backend_of("grounding-dino+sam", folders), tiny.pictures(4)
    found = [grounding for grounding in backend(images, TEXTS, list("abcd")) if grounding.boxes]
    assert len(found) > 1
    for grounding in found:
        assert len(grounding.labels) == len(grounding.boxes) == len(grounding.masks) == len(grounding.scores)
        for label in grounding.labels:
            assert any({*re.findall(r"\w+", label)} <= {*re.findall(r"\w+", text)} for text in TEXTS)


def test_florence_without_places_in_its_answer_finds_nothing(tmp_path):
    florence = Florence2(str(tiny.florence2(tmp_path, answers=["<sep>", "<poly>", "</poly>"])), max_new_tokens=8)
    (region,) = florence(tiny.pictures(1), ["a red apple"])
    assert region.outcome == "no_region" and not region.boxes


ANSWERS = {
    "nothing": ("</s><s></s>", 0, 0),
    "one point": ("<loc_5><loc_5>", 0, 0),
    "two points": ("<loc_5><loc_5><loc_50><loc_50>", 0, 0),
    "triangle": ("<loc_100><loc_100><loc_800><loc_100><loc_800><loc_900>", 1, 1),
    "odd": ("<loc_100><loc_100><loc_800><loc_100><loc_800><loc_900><loc_3>", 1, 1),
    "self-crossing": ("<loc_0><loc_0><loc_900><loc_900><loc_900><loc_0><loc_0><loc_900>", 1, 1),
    "two pieces": (
        "<loc_100><loc_100><loc_300><loc_100><loc_300><loc_300><sep>"
        "<loc_500><loc_500><loc_800><loc_500><loc_800><loc_800>",
        1,
        2,
    ),
    "two instances": (
        "<poly><loc_100><loc_100><loc_300><loc_100><loc_300><loc_300></poly>"
        "<poly><loc_500><loc_500><loc_800><loc_500><loc_800><loc_800></poly>",
        2,
        2,
    ),
    "one of them a line": (
        "<poly><loc_100><loc_100><loc_300><loc_100></poly>"
        "<poly><loc_500><loc_500><loc_800><loc_500><loc_800><loc_800></poly>",
        1,
        1,
    ),
    "outside of the bins": ("<loc_100><loc_100><loc_5000><loc_100><loc_5000><loc_900>", 1, 1),
    "words": ("a red apple", 0, 0),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_of_every_kind(kind, folders):
    answer, boxes, polygons = ANSWERS[kind]
    florence = Florence2(folders("florence2"))
    assert florence.task == SEGMENTATION_TASK
    region = florence.parse(answer, (200, 100))
    assert (len(region.boxes), len(region.polygons)) == (boxes, polygons)
    assert region.outcome == ("grounded" if boxes else "no_region")
    for left, top, right, bottom in region.boxes:
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
    if kind == "triangle":
        assert region.boxes[0] == pytest.approx([20, 10, 160, 90], abs=1)


def test_phrases_give_a_box_each(folders):
    florence = Florence2(folders("florence2"), phrases=True)
    assert florence.task == PHRASES_TASK
    answer = "a red apple<loc_0><loc_0><loc_499><loc_499>a car<loc_600><loc_600><loc_999><loc_999><loc_9><loc_9>"
    region = florence.parse(answer, (100, 100))
    assert np.allclose(region.boxes, [[0, 0, 50, 50], [60, 60, 100, 100]], atol=1)
    assert region.labels == ["a red apple", "a car"]


def test_boxes_beyond_the_most_are_told(folders):
    florence = Florence2(folders("florence2"), phrases=True)
    box = "<loc_{0}><loc_{0}><loc_999><loc_999>"
    for count, told in ((MAX_BOXES, ""), (40, "the first 32 of 40 boxes are used")):
        region = florence.parse("".join(f"thing {i}{box.format(9 * i)}" for i in range(count)), (100, 100))
        assert (region.outcome, region.detail, len(region.boxes)) == ("grounded", told, MAX_BOXES)


def test_repeating_a_box_changes_nothing_and_a_text_has_the_union(folders):
    segmenter = Sam(folders("sam"))
    first, second = tiny.pictures(2)
    boxes = [[2.0, 2.0, 30.0, 30.0], [10.0, 5.0, 50.0, 40.0], [0.0, 0.0, 8.0, 8.0]]
    (several, scores), _ = segmenter([first, second], [boxes, boxes[:1]])
    alone = [segmenter([first], [[box]])[0] for box in boxes]
    assert (several != np.concatenate([mask for mask, _ in alone])).mean() < 0.001
    assert scores.tolist() == pytest.approx([score.item() for _, score in alone], abs=1e-5)
    (whole,) = TwoSteps(lambda images, texts: [Grounding(boxes)], segmenter, {})([first], ["all"], ["a"])
    assert np.array_equal(whole.mask, several.any(0)) and whole.score == pytest.approx(scores.mean().item())


def test_weights_may_be_bfloat16(folders):
    segmenter = Sam(folders("sam"), dtype=torch.bfloat16)
    ((masks, scores),) = segmenter(tiny.pictures(1), [[[2.0, 2.0, 30.0, 30.0]]])
    assert masks.shape == (1, 47, 61) and np.isfinite(scores.item())
    florence = Florence2(folders("florence2"), dtype=torch.bfloat16, max_new_tokens=12)
    assert florence(tiny.pictures(1), ["a red apple"])[0].outcome in ("grounded", "no_region")


def test_what_cannot_be_loaded_is_said_in_one_sentence(folders, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the backend is 'florence'"):
        load_backend("florence")
    with pytest.raises(ValueError, match="no grounder"):
        load_backend("sam3", grounder="folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no checkpoint: it has no config\.json"):
        load_backend("florence2+sam", grounder=str(tmp_path / "empty"), segmenter=folders("sam"))
    monkeypatch.setattr("agevlm.grounding.models.is_torchvision_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs torchvision: pip install 'agevlm\[ground\]'"):
        load_backend("florence2+sam2", grounder=folders("florence2"), segmenter="folder")


class TheMiddle(Florence2):
    """A grounder that this repository does not have: the middle of every picture, whatever the text."""

    def __call__(self, images, texts):
        return [Grounding([[w / 4, h / 4, w * 3 / 4, h * 3 / 4]]) for w, h in (image.size for image in images)]


def test_a_new_backend_is_a_class_and_a_line(folders, monkeypatch):
    monkeypatch.setattr("agevlm.grounding.models.TheMiddle", TheMiddle, raising=False)
    monkeypatch.setitem(GROUNDERS, "middle", Published("TheMiddle", "nobody/middle"))
    assert "middle+sam" in names()
    backend = load_backend("middle+sam", grounder=folders("florence2"), segmenter=folders("sam"))
    image = tiny.pictures(1)[0]
    (found,) = backend([image], ["anything"], ["a"])
    (direct,) = backend.segmenter([image], [TheMiddle.__call__(None, [image], [""])[0].boxes])
    np.testing.assert_array_equal(found.mask, direct[0][0])
    assert len(backend.revisions) == 2
