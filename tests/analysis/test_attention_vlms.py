"""Maps of ours and of concatenating models: attention forced onto a cell shows on that cell's pixels."""

import numpy as np
import pytest
import torch

from agevlm.analysis.attention import attend, in_mask_mass, write_attention
from agevlm.analysis.subjects import Subject
from agevlm.models import load
from builders import mask, picture, tiny_model, tiny_processor
from vlms import CONCATENATING, EVERY, fast_vlm, force, llava, ours, smolvlm


QUESTION = "Is there a red apple?"
SIZE = (100, 60)
# By hand, for a picture of 100 x 60: (visual token, its pixels as left, top, right, bottom).
CELLS = {
    "ours": (5, (67, 20 - 6, 100, 47)),  # padded above and below by 20: the second row of 3 x 3 is 13.3 to 46.7
    "llava": (7, (40, 40, 60, 60)),  # the middle 60 x 60 from x = 20
    "llava-pad": (5, (67, 14, 100, 47)),
    "fast_vlm": (5, (67, 14, 100, 47)),
    "smolvlm": (4 + 3, (75, 15, 100, 30)),  # last of the second tile, which is the upper right quarter
    "qwen": (7, (40, 20, 60, 40)),  # 3 rows of 5
}


@pytest.mark.parametrize("name", EVERY)
def test_attention_forced_onto_a_cell(name):
    subject = EVERY[name]()
    token, (left, top, right, bottom) = CELLS[name]
    place = token
    if subject.concatenates:
        encoded = subject.encode([picture(*SIZE)], [QUESTION])
        place = int(encoded.image_BT[0].nonzero()[token, 0])
    force(subject, place)
    result = attend(subject.model, subject.processor, picture(*SIZE), QUESTION, max_new_tokens=2)
    np.testing.assert_allclose(result.weights[:, token], 1, atol=1e-4)
    np.testing.assert_allclose(result.image_mass, 1, atol=1e-4)
    np.testing.assert_allclose(result.token_weights[:, :, token], 1, atol=1e-4)
    y, x = np.unravel_index(result.mean.argmax(), result.mean.shape)
    assert left <= x < right and top <= y < bottom
    hot = result.mean > 0.8 * result.mean.max()
    assert hot[top:bottom, left:right].sum() == hot.sum()
    assert in_mask_mass(result, mask(*SIZE, box=(left, top, right, bottom))) == pytest.approx(1, abs=1e-4)
    away = mask(*SIZE, box=(0, 50, 15, 60))
    assert in_mask_mass(result, away) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("geometry", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(150, 60), (60, 150), (96, 96)])
def test_forced_attention_in_every_geometry_of_ours(geometry, size):
    subject = ours()
    subject.processor.image_processor.geometry = geometry
    force(subject, 4)  # the middle of 3 x 3 is the picture's middle in all of them
    result = attend(subject.model, subject.processor, picture(*size), QUESTION, max_new_tokens=1)
    y, x = np.nonzero(result.mean > 0.9 * result.mean.max())
    assert abs(x.mean() - (size[0] - 1) / 2) < 1 and abs(y.mean() - (size[1] - 1) / 2) < 1
    side = {"pad": (max(size), max(size)), "stretch": size, "crop": (min(size), min(size))}[geometry]
    for places, length in ((x, side[0]), (y, side[1])):
        assert places.max() - places.min() < length / 3


@pytest.mark.parametrize("name", CONCATENATING)
def test_the_first_layer_by_default_and_any_on_request(name):
    subject = CONCATENATING[name]()
    pair = (subject.model, subject.processor)
    first = attend(*pair, picture(*SIZE), QUESTION, max_new_tokens=2)
    both = attend(*pair, picture(*SIZE), QUESTION, layers=[1, 0], max_new_tokens=2)
    assert first.layers == [0] and both.layers == [0, 1]
    np.testing.assert_array_equal(first.weights[0], both.weights[0])
    assert np.abs(both.weights[0] - both.weights[1]).max() > 1e-6
    np.testing.assert_allclose(both.weights.sum(1), 1, rtol=1e-5)
    assert ((both.image_mass > 0) & (both.image_mass < 1)).all()
    assert both.token_weights.shape == (2, len(both.tokens), both.cells.count)
    with pytest.raises(ValueError, match=r"layer\(s\) \[7\]; there is in \[0, 1\]"):
        attend(*pair, picture(*SIZE), QUESTION, layers=[7])


def test_the_question_and_the_first_token_look_as_the_models_own_maps_say():
    """Ours: the recorded attention is the map that guidance trains."""
    model, processor = tiny_model(), tiny_processor()
    result = attend(model, processor, picture(*SIZE), QUESTION, max_new_tokens=3)
    subject = ours()
    encoded = subject.encode([picture(*SIZE)], [QUESTION], answer_next=True)
    last = torch.zeros_like(encoded.text_BT)
    last[0, -1] = True
    with torch.no_grad():
        for query_mask, seen in ((encoded.text_BT, result.weights), (last, result.token_weights[:, 0])):
            maps = model.base_model(**encoded.inputs, guidance_query_mask=query_mask).cross_attention_maps
            np.testing.assert_allclose(seen, maps[:, 0].numpy(), atol=1e-6)


def test_models_side_by_side(tmp_path):
    subjects = {"ours": ours(), "llava": llava(), "fast": fast_vlm()}
    models = {name: (subject.model, subject.processor) for name, subject in subjects.items()}
    summary = write_attention(models, picture(*SIZE), QUESTION, tmp_path, mask(*SIZE), max_new_tokens=3)
    assert [summary["models"][name]["layers"] for name in models] == [[1, 4], [0], [0]]
    assert summary["models"]["ours"]["image_mass"] == [1, 1]
    assert all((tmp_path / f"{kind}-{name}.png").is_file() for name in models for kind in ("overlay", "tokens"))
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as maps:
        assert maps["llava/maps"].shape == (1, 60, 100) and maps["fast/token_maps"].dtype == np.float16


def test_the_image_placeholder_is_no_question():
    subject = llava()
    with pytest.raises(ValueError, match="holds the image placeholder"):
        attend(subject.model, subject.processor, picture(), "What is <image>?")


def test_a_processor_without_a_chat_template_is_refused():
    subject = llava()
    subject.processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        attend(subject.model, subject.processor, picture(), QUESTION)


@pytest.mark.parametrize("make", [ours, llava, fast_vlm, smolvlm], ids=lambda make: make.__name__)
def test_a_folder_gives_the_same_answers_and_looks(make, tmp_path):
    """A ConvNeXt tower knows no attention kernels, so none may be asked for."""
    subject = make()
    for part in (subject.model, subject.processor):
        part.save_pretrained(tmp_path)
    loaded = Subject(*load(tmp_path))
    assert not loaded.model.training and loaded.concatenates == subject.concatenates
    first, second = (
        attend(each.model, each.processor, picture(60, 40), "Is there an apple?", max_new_tokens=2)
        for each in (subject, loaded)
    )
    assert first.answer == second.answer and (first.weights == second.weights).all()
