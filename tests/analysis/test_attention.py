"""Attention maps of a random model: on the picture's pixels, from the question's tokens, written whole."""

import json

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from agevlm.analysis.attention import attend, draw_panels, in_mask_mass, write_attention, write_examples
from agevlm.analysis.cli import attention as main
from agevlm.analysis.subjects import Subject
from agevlm.models import encode, render
from builders import mask, picture, save_tiny, tiny_model, tiny_processor
from vlms import llava


QUESTION = "Is there a red apple in the image?"


@pytest.mark.parametrize("geometry", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(96, 96), (150, 60)])
def test_maps_lie_on_the_pictures_pixels(geometry, size):
    processor = tiny_processor(geometry=geometry)
    result = attend(tiny_model(), processor, picture(*size), QUESTION, max_new_tokens=3)
    assert result.layers == [1, 4]
    assert result.weights.shape == (2, 9)
    np.testing.assert_allclose(result.weights.sum(1), 1, rtol=1e-5)
    assert result.maps.shape == (2, size[1], size[0])
    assert result.mean.shape == (size[1], size[0])
    # The processor's own way back, scaled to a density. It resizes twice, which blurs the border by a pixel.
    expected = processor.image_processor.grid_to_pixels(result.weights[1].reshape(3, 3), (size[1], size[0]))
    shown = expected > 0
    scale = result.maps[1][shown].mean() / expected[shown].mean()
    np.testing.assert_allclose(result.maps[1][shown], expected[shown] * scale, atol=0.06)


def test_the_map_is_of_the_questions_tokens_alone():
    """What the prompt adds behind the question changes the answer's context, not the look: attention is causal."""
    model, processor = tiny_model(), tiny_processor()
    alone = attend(model, processor, picture(), QUESTION, max_new_tokens=2)
    suffixed = attend(model, processor, picture(), QUESTION, prompt=QUESTION + " Please answer.", max_new_tokens=2)
    np.testing.assert_allclose(alone.weights, suffixed.weights, rtol=1e-5)
    other = attend(model, processor, picture(), "How many cars are there?", max_new_tokens=2)
    assert np.abs(alone.weights - other.weights).max() > 1e-7


def test_every_phrase_of_the_question_has_a_look_and_a_panel(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    whole = attend(model, processor, picture(), QUESTION, max_new_tokens=1)
    alone = attend(model, processor, picture(), "red apple", prompt=QUESTION, max_new_tokens=1)
    np.testing.assert_allclose(whole.part("red apple"), alone.weights, rtol=1e-5)
    np.testing.assert_allclose(whole.part(QUESTION), whole.weights, rtol=1e-5)
    twice = attend(model, processor, picture(), "A cat or a cat", max_new_tokens=1)
    assert np.abs(twice.part("cat") - twice.part("cat", 5)).max() > 1e-7
    plain, drawn = (draw_panels({"m": whole}, picture(), None, phrases) for phrases in ((), ("red apple", "image")))
    assert drawn.width == plain.width and drawn.height > plain.height + 300
    with pytest.raises(ValueError, match="does not hold the phrase 'dog'; copy it"):
        write_attention({"m": (model, processor)}, picture(), QUESTION, tmp_path, phrases=["apple", "dog"])


def test_the_answer_is_what_generate_says():
    model, processor = tiny_model(), tiny_processor()
    answer = attend(model, processor, picture(), QUESTION, max_new_tokens=5).answer
    text = processor.apply_chat_template(
        [{"role": "user", "content": "<|image|>" + QUESTION}], add_generation_prompt=True, tokenize=False
    )
    batch = processor(images=[[picture()]], text=[text], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
    new = tokens[0, batch["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("question", "prompt", "message"),
    [("  ", None, "question is empty"), (QUESTION, "Something else", "does not occur")],
)
def test_bad_questions(question, prompt, message):
    with pytest.raises(ValueError, match=message):
        attend(tiny_model(), tiny_processor(), picture(), question, prompt=prompt)


def test_mass_inside_everything_is_one():
    processor = tiny_processor()
    result = attend(tiny_model(), processor, picture(), QUESTION, max_new_tokens=2)
    left, right = mask(box=(0, 0, 32, 96)), mask(box=(32, 0, 96, 96))
    assert in_mask_mass(result, mask(box=(0, 0, 96, 96))) == pytest.approx(1)
    assert in_mask_mass(result, left) + in_mask_mass(result, right) == pytest.approx(1)


def test_written_files(tmp_path):
    models = {name: (tiny_model(seed=seed), tiny_processor()) for seed, name in enumerate(("a/first", "second"))}
    summary = write_attention(models, picture(120, 80), QUESTION, tmp_path, mask(120, 80), max_new_tokens=3)
    assert json.loads((tmp_path / "attention.json").read_text(encoding="utf-8")) == summary
    assert {path.name for path in tmp_path.iterdir()} == {
        "attention.json", "maps.npz", "panels.png", "overlay-a-first.png", "overlay-second.png",
        "first-a-first.png", "first-second.png", "tokens-a-first.png", "tokens-second.png",
    }  # fmt: skip
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as maps:
        for name in models:
            count = len(summary["models"][name]["generated"])
            assert maps[f"{name}/maps"].shape == (2, 80, 120)
            assert maps[f"{name}/token_maps"].shape == (count, 80, 120)
            assert maps[f"{name}/token_weights"].shape == (2, count, 9)
            np.testing.assert_array_equal(maps[f"{name}/mean"], maps[f"{name}/maps"].mean(0))
    assert all(0 < result["in_mask_mass"] < 1 for result in summary["models"].values())
    with pytest.raises(ValueError, match="mask is 96 x 96 but the picture is 120 x 80"):
        write_attention(models, picture(120, 80), QUESTION, tmp_path, mask())


def test_a_large_picture_keeps_its_own_pixels_but_not_for_every_token(tmp_path):
    models = {"m": (tiny_model(), tiny_processor())}
    summary = write_attention(models, picture(2048, 60), QUESTION, tmp_path, max_new_tokens=2)
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as maps:
        assert maps["m/maps"].shape == (2, 60, 2048)
        assert maps["m/token_maps"].shape[1:] == (30, 1024)
        assert summary["overlay_peak"] == pytest.approx(max(5, maps["m/mean"].max()))
    with PilImage.open(tmp_path / "overlay-m.png") as drawn:
        assert drawn.size == (2048, 60)


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        write_attention({"m": (tiny_model(), tiny_processor())}, picture(), QUESTION, tmp_path / "file")


def test_examples_for_the_report(tmp_path):
    models = {"One": (tiny_model(), tiny_processor()), "Two": (tiny_model(seed=1), tiny_processor())}
    rows = [
        {"id": "q/1", "image": picture(), "mask": mask(), "question": QUESTION + "\nA. yes", "answer": "yes"},
        {"id": "q/2", "image": picture(seed=1), "mask": None, "question": QUESTION, "answer": "no"},
    ]
    asked = []
    examples = write_examples(
        models, rows, tmp_path, prompt=lambda row: asked.append(row["id"]) or row["question"], correct=lambda *_: True
    )
    assert asked == ["q/1", "q/2"]
    assert examples[0]["question"] == QUESTION
    for example, masked in zip(examples, (True, False), strict=True):
        assert [panel["title"] for panel in example["panels"]] == ["One", "Two"]
        assert all(panel["correct"] for panel in example["panels"])
        looks = [look for panel in example["panels"] for look in panel["looks"]]
        assert [look["title"] for look in looks] == ["layer 1", "mean"] * 2
        assert all((look["in_mask_mass"] is not None) == masked for look in looks)
    written = {path.name for path in tmp_path.iterdir()}
    ends = ("", "-One-first", "-One-mean", "-Two-first", "-Two-mean")
    assert written == {f"q-{i}{end}.png" for i in (1, 2) for end in ends}


def test_the_first_layer_and_the_mean_are_drawn_and_measured():
    model, processor = tiny_model(), tiny_processor()
    several = attend(model, processor, picture(), QUESTION, max_new_tokens=1)
    alone = attend(model, processor, picture(), QUESTION, max_new_tokens=1, layers=[1])
    assert several.looks == {"first": slice(1), "mean": slice(None)} and alone.looks == {"mean": slice(None)}
    np.testing.assert_array_equal(several.maps[several.looks["first"]].mean(0), alone.mean)
    np.testing.assert_array_equal(several.maps[several.looks["mean"]].mean(0), several.mean)
    assert in_mask_mass(several, mask(), several.looks["first"]) == in_mask_mass(alone, mask())
    assert in_mask_mass(several, mask()) != in_mask_mass(alone, mask())


def test_command_line(tmp_path, capsys):
    save_tiny(tmp_path / "checkpoint")
    picture(100, 70).save(tmp_path / "photo.png")
    mask(100, 70).save(tmp_path / "mask.png")
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "photo.png"), QUESTION]
    main(
        [*arguments, "--output", str(tmp_path / "out"), "--mask", str(tmp_path / "mask.png"), "--max-new-tokens", "3"]
    )
    assert (tmp_path / "out" / "overlay-checkpoint.png").is_file()
    assert "layer 1, 4: 100 %, 100 % of the question's attention on the picture; in-mask" in capsys.readouterr().out


def test_command_line_names_a_broken_picture(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"photo\.png: the picture cannot be decoded"):
        main(["anything", str(tmp_path / "photo.png"), QUESTION, "--output", str(tmp_path)])


def test_a_conversation_is_what_generate_is_told():
    """Earlier turns change what the question's tokens see before them; its own tokens are found behind them, even
    where the same words stand in an earlier turn."""
    model, processor = tiny_model(), tiny_processor()
    before = [(QUESTION, "user"), ("user", QUESTION)]
    told = attend(model, processor, picture(), QUESTION, before=before, max_new_tokens=4)
    text = render(processor, QUESTION, 1, before)
    assert text.count(QUESTION) == 3 and text.count(processor.image_token) == 1
    inputs = encode(model, processor, [picture()], [text])
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert told.tokens == [processor.tokenizer.decode([token]) for token in expected.tolist()]
    alone = attend(model, processor, picture(), QUESTION, max_new_tokens=1)
    assert told.words.shape == alone.words.shape and told.places == alone.places
    assert np.abs(told.words - alone.words).max() > 1e-7
    word = attend(model, processor, picture(), "user", before=before, max_new_tokens=1)
    assert word.words.shape[1] == len(processor.tokenizer("user", add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match="control token"):
        attend(model, processor, picture(), QUESTION, before=[(QUESTION, processor.image_token)])


@pytest.mark.parametrize("subject", [lambda: Subject(tiny_model(), tiny_processor()), llava], ids=["ours", "llava"])
def test_each_of_several_pictures_has_its_part_of_the_map(subject):
    subject = subject()
    model, processor = subject.model, subject.processor
    first, second = picture(), picture(150, 60, seed=3)
    both = attend(model, processor, [first, second], QUESTION, max_new_tokens=2)
    counts = [cells.count for cells in both.pictures]
    assert both.weights.shape[1] == sum(counts) == both.token_weights.shape[2]
    maps = both.spread(both.weights[0], 200)
    assert [heat.shape for heat in maps] == [(96, 96), (60, 150)]
    # The picture's own tokens and no others decide its map.
    weights = np.zeros(sum(counts), dtype=np.float32)
    weights[: counts[0]] = 1 / counts[0]
    one, none = both.spread(weights, 200)
    assert one.max() > 1 and not none.any()
    with pytest.raises(ValueError):
        _ = both.cells
    # A picture's tokens come in the order of the pictures.
    turned = attend(model, processor, [second, first], QUESTION, max_new_tokens=1)
    assert [cells.count for cells in turned.pictures] == counts[::-1]
    assert np.abs(turned.weights - both.weights).max() > 1e-7
