"""Converted models in the paper's figures and tables: `agevlm analyze attention | similarity | padding`, `eval`."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_baselines import CONVLLAVA_SIZE, LAYERS, QUESTION, conversation, encode
from transformers import AutoModelForImageTextToText

from agevlm.analysis import cli as analyze
from agevlm.analysis.attention import attend, in_mask_mass
from agevlm.analysis.subjects import Subject
from agevlm.evaluation import run
from agevlm.evaluation.cli import evaluate
from agevlm.evaluation.inputs import row_image
from builders import mask, picture, tiny_scenes
from vlms import force


SIDE = {"convllava": CONVLLAVA_SIZE // 64, "mobilevlm-v2": 12}  # cells
WIDE = (80, 40)
# By hand, for a picture of 100 x 60 that is padded by 20 above and below: (visual token, its pixels).
CELLS = {
    "convllava": (2 * 5 + 2, (40, 20, 60, 40)),  # the middle of cells of 20 pixels
    "mobilevlm-v2": (6 * 12 + 3, (25, 30, 34, 39)),  # the seventh row of cells of 8.3 pixels: 50 - 20 to 58.3 - 20
}


@pytest.fixture(scope="module")
def flags(pair):
    return ["--trust-remote-code"] * (pair[0].system == "mobilevlm-v2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Four wide pictures with a question each."""
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    texts = ("Is there a red apple?", "How many cars are there?", "blue green", "What is on the left of the house?")
    made = [{"id": str(n), "image": picture(*WIDE, seed=n), "question": text} for n, text in enumerate(texts)]
    Dataset.from_list(made).to_parquet(str(file))
    return file


def read(*path) -> dict:
    folder, name = path
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_map_is_the_first_layers_attention_of_the_questions_tokens(pair, loaded):
    """Against eager weights, the question's rows found from the published tokens."""
    original, model, processor = loaded
    image = picture(*WIDE)
    eager = AutoModelForImageTextToText.from_pretrained(pair[1], trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        inputs = encode(processor, [conversation(image, [QUESTION])])
        weights = eager.eval()(**inputs, output_attentions=True).attentions[0][0].mean(0)
    visual = inputs["input_ids"][0] == processor.image_token_id
    asked_first = int(visual.nonzero()[-1]) + 3  # behind the space and the line break
    asked = weights[asked_first : asked_first + original.length(QUESTION)]
    expected = asked[:, visual].mean(0)
    result = attend(model, processor, image, QUESTION, max_new_tokens=4)
    assert result.layers == [0] and result.cells.count == SIDE[original.system] ** 2 == visual.sum()
    np.testing.assert_allclose(result.image_mass[0], expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(result.weights[0], expected / expected.sum(), rtol=1e-3, atol=1e-6)


def test_attention_forced_onto_a_cell_shows_on_its_pixels(loaded):
    original, model, processor = loaded
    subject, image = Subject(copy.deepcopy(model), processor), picture(100, 60)
    token, (left, top, right, bottom) = CELLS[original.system]
    force(subject, int(subject.encode([image], [QUESTION]).image_BT[0].nonzero()[token, 0]))
    result = attend(subject.model, processor, image, QUESTION, max_new_tokens=2)
    np.testing.assert_allclose(result.weights[:, token], 1, atol=1e-3)
    y, x = np.unravel_index(result.mean.argmax(), result.mean.shape)
    assert left <= x < right and top <= y < bottom
    around = mask(100, 60, box=(left, top, right, bottom))
    assert in_mask_mass(result, around) == pytest.approx(1, abs=1e-3)
    assert in_mask_mass(result, mask(100, 60, box=(0, 50, 15, 60))) == pytest.approx(0, abs=1e-3)


def test_analyze_attention(pair, loaded, flags, tmp_path):
    (original, folder), tokenizer = pair, loaded[2].tokenizer
    image = picture(*WIDE)
    image.save(tmp_path / "picture.png")
    command = [str(folder), str(tmp_path / "picture.png"), QUESTION, "--output", str(tmp_path / "out")]
    analyze.attention([*command, "--max-new-tokens", "5", *flags])
    told = read(tmp_path / "out", "attention.json")["models"][original.system]
    assert told["layers"] == [0] and 0 < told["image_mass"][0] < 1
    answer = tokenizer.decode(original.continuation(image, QUESTION, 5), skip_special_tokens=True)
    assert told["answer"].strip() == answer.strip()
    assert (tmp_path / "out" / "panels.png").stat().st_size > 10_000


def test_analyze_similarity(pair, flags, rows, tmp_path):
    """The paper's score, the cosine of mean final states, from the published code's own states."""
    analyze.similarity([str(pair[1]), str(rows), "--output", str(tmp_path), "--seeds", "2", *flags])
    told = read(tmp_path, "similarity.json")
    assert told["pairs"] == 4 and told["headline"]["layer"] == LAYERS
    with np.load(tmp_path / "scores.npz") as scores:
        matched = scores["matched/centroid"]
    assert matched.shape == (LAYERS + 1, 4)
    for score, row in zip(matched[-1], Dataset.from_parquet(str(rows)), strict=True):
        seen, asked = pair[0].states(row["image"], row["question"])
        assert score == pytest.approx(torch.cosine_similarity(seen.mean(0), asked.mean(0), dim=0).item(), abs=1e-5)
    assert (tmp_path / "histogram.png").is_file() and (tmp_path / "layers.png").is_file()


def test_analyze_padding(pair, flags, rows, tmp_path):
    original, folder = pair
    analyze.padding([str(folder), str(rows), "--output", str(tmp_path), *flags])
    told = read(tmp_path, "padding.json")
    assert told["pictures"] == 4
    # Twice as wide as high: of five rows of cells the outer two show less than half, of twelve the outer six nothing.
    area = {"convllava": 2 / 5, "mobilevlm-v2": 1 / 2}[original.system]
    for entry in told["variants"].values():
        assert entry["area"] == pytest.approx(area) and 0 < entry["share"] < 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    return tiny_scenes(folder, test=4)


def test_eval(pair, loaded, flags, scenes, tmp_path):
    """Answers are the published code's."""
    (original, folder), tokenizer = pair, loaded[2].tokenizer
    command = [str(folder), "--scenes", str(scenes), "--output", str(tmp_path / "out"), "--batch-size", "3"]
    evaluate([*command, "--benchmarks", "pope", "cvbench", "--max-new-tokens", "4", *flags])
    metrics = read(tmp_path / "out" / original.system, "metrics.json")
    assert {name: result["skipped"] for name, result in metrics["benchmarks"].items()} == {"pope": 0, "cvbench": 0}
    asked = run.load_scenes(scenes, "composition", run.choose(["pope"]))["pope"]
    lines = (tmp_path / "out" / original.system / "pope" / "predictions.jsonl").read_text(encoding="utf-8")
    for row, line in zip(asked, map(json.loads, lines.splitlines()), strict=True):
        answer = original.continuation(row_image(row), line["prompt"], 4)
        answer = tokenizer.decode(answer, skip_special_tokens=True)
        assert line["output"] == answer.strip()


def test_code_that_travels_with_a_model_runs_only_when_asked_for(pair, tmp_path):
    original, folder = pair
    if original.system != "mobilevlm-v2":
        pytest.skip("ConvLLaVA is transformers' own class")
    picture().save(tmp_path / "picture.png")
    for command in (
        lambda: analyze.attention([str(folder), str(tmp_path / "picture.png"), QUESTION, "--output", str(tmp_path)]),
        lambda: run.load(str(folder)),
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            command()
