"""Exported graphs answer as the model does: torch.export and ONNX, one row or many, with and without pictures."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import DynamicCache
from transformers.exporters import ExportedModel

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor
from agevlm.serving.export import main
from agevlm.serving.exported import ExportedAgeVlm, export
from builders import IMAGE_SIZE, picture, tiny_model, tiny_processor


ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "agevlm-tiny"
QUESTIONS = ("Describe the image.", "How many trees are there in the image?", "Is there a red flower in the image?")


@pytest.fixture
def onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"ONNX export needs {package}: pip install agevlm[export]")


def inputs_of(processor, rows):
    """Processor output, left-padded, of rows (question, list of pictures)."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": "<|image|>" * len(images) + question}], add_generation_prompt=True
        )
        for question, images in rows
    ]
    images = [images for _, images in rows] if any(images for _, images in rows) else None
    return processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")


def assert_same_answers(model, exported, inputs, tolerance=2e-4):
    """Tokens and the logits behind them."""
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    wanted, given = model.generate(**inputs, **options), exported.generate(**inputs, **options)
    assert torch.equal(given.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(given.logits), torch.stack(wanted.logits), atol=tolerance, rtol=tolerance)


def mixed_rows():
    """One picture, none, one again: what a batch may hold at once."""
    return [("Describe the image.", [picture()]), ("Is there a car?", []), ("How many?", [picture(80, 40, seed=1)])]


@pytest.mark.slow
def test_onnx_runtime_gives_the_tokens_of_the_checkpoint(onnx, tmp_path, capsys):
    """`agevlm export`, then every question about the example picture, alone and as one batch with beams."""
    main([str(CHECKPOINT), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    said = capsys.readouterr()
    place = str(tmp_path / "out")
    last = f"written to {place}; next: agevlm.serving.exported.ExportedAgeVlm.from_pretrained({place!r})"
    assert said.out.splitlines()[-1] == last
    assert "decoder.onnx.data" in said.out and "[torch.onnx]" not in said.out and "experimental" not in said.err
    model = AgeVlmForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    processor = AgeVlmProcessor.from_pretrained(tmp_path / "out")
    exported = ExportedAgeVlm.from_pretrained(tmp_path / "out")
    image = Image.open(ROOT / "docs" / "images" / "example.png").convert("RGB")
    for question in QUESTIONS:
        assert_same_answers(model, exported, inputs_of(processor, [(question, [image])]))
    batch = inputs_of(processor, [(question, [image]) for question in QUESTIONS])
    assert_same_answers(model, exported, batch)
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12}
    assert torch.equal(exported.generate(**batch, **beams), model.generate(**batch, **beams))
    # No weight is stored twice, the tied embedding included.
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert files["vision.onnx.data"] + files["decoder.onnx.data"] == pytest.approx(weights, rel=0.02)


@pytest.mark.parametrize("rows", [mixed_rows(), [("Is there a car?", [])]], ids=["mixed", "text only"])
def test_torch_export_gives_the_tokens_of_the_model(torch_export, rows):
    model, exported = torch_export
    assert_same_answers(model, exported, inputs_of(tiny_processor(), rows))


@pytest.fixture(scope="module")
def torch_export():
    model = tiny_model()
    return model, ExportedAgeVlm(export(model, IMAGE_SIZE, export_format="dynamo"))


def test_pictures_reach_the_exported_decoder(torch_export):
    _, exported = torch_export
    inputs = inputs_of(tiny_processor(), [("Describe the image.", [picture()])])
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    first, second = (exported.generate(**given, **options).logits[0] for given in (inputs, other))
    assert (first - second).abs().max() > 1e-2


def test_export_leaves_the_model_whole(torch_export):
    model, _ = torch_export
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_mistakes_are_named(torch_export, tmp_path):
    model, exported = torch_export
    inputs = inputs_of(tiny_processor(), [("Which?", [picture(), picture()])])
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 96, 96\).*takes \(1, 1, 3, 96, 96\)"):
        exported.generate(**inputs)
    one = inputs_of(tiny_processor(), [("Which?", [picture()])])
    with pytest.raises(ValueError, match="leave `cache` out"):
        exported.generate(**one, cache=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="generate without drafts"):
        exported.generate(**one, prompt_lookup_num_tokens=3, max_new_tokens=8)
    with pytest.raises(ValueError, match="int8 comes from ONNX Runtime"):
        export(model, IMAGE_SIZE, export_format="dynamo", int8=True)
    only_vision = ExportedModel({"vision": exported.exported.components["vision"]}, "dynamo", config=model.config)
    with pytest.raises(ValueError, match="`vision` and `decoder` are needed"):
        ExportedAgeVlm(only_vision)
    (tmp_path / "file").write_text("in use", encoding="utf-8")
    with pytest.raises(ValueError, match="there already"):
        main([str(CHECKPOINT), str(tmp_path)])
    with pytest.raises(ValueError, match="at least 1"):
        main([str(CHECKPOINT), str(tmp_path / "new"), "--images", "0"])
    for name, message in (
        (ROOT / "checkpoints/tiny-parts/language_model", "is no AGE-VLM checkpoint: its model type is 'llama'"),
        (tmp_path / "nowhere", "nowhere is neither a folder nor the id of a repository"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(name), str(tmp_path / "new")])
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_the_same_command_again_finds_its_export_finished(tmp_path, monkeypatch, capsys):
    class Graphs:
        def save_pretrained(self, folder):
            (folder / "export.json").write_text("{}")

    monkeypatch.setattr("agevlm.serving.exported.export", lambda *_, **__: Graphs())
    command = [str(CHECKPOINT), str(tmp_path / "out")]
    main(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    main(command)
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'out'} holds this export, nothing to do"
    with pytest.raises(ValueError, match=r"holds another export \(int8: False there, True asked\)"):
        main([*command, "--int8"])
    shutil.copytree(CHECKPOINT, tmp_path / "other")
    sharper = json.loads((tmp_path / "other/generation_config.json").read_text()) | {"temperature": 0.5}
    (tmp_path / "other/generation_config.json").write_text(json.dumps(sharper))
    with pytest.raises(ValueError, match=r"holds another export \(settings"):
        main([str(tmp_path / "other"), *command[1:]])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_onnx_with_several_pictures_per_row(onnx):
    model = tiny_model()
    exported = ExportedAgeVlm(export(model, IMAGE_SIZE, images=2))
    rows = [("Which?", [picture(), picture(60, 96, seed=1)]), ("And here?", [picture(seed=2)])]
    assert_same_answers(model, exported, inputs_of(tiny_processor(), rows))


@pytest.mark.slow
def test_pictures_need_not_be_square():
    model = tiny_model()
    exported = ExportedAgeVlm(export(model, (64, 96), export_format="dynamo"))
    processor = tiny_processor()
    processor.image_processor.size = {"height": 64, "width": 96}
    assert_same_answers(model, exported, inputs_of(processor, mixed_rows()))


@pytest.mark.slow
def test_torch_export_survives_the_disk(torch_export, tmp_path, monkeypatch):
    # torch's own warning about reading such files has too few arguments, which pytest's log handler takes for an error
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    model, exported = torch_export
    exported.exported.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dynamo programs, which run code when loaded"):
        ExportedAgeVlm.from_pretrained(tmp_path, trust_remote_code=False)
    read_back = ExportedAgeVlm.from_pretrained(tmp_path, trust_remote_code=True)
    assert_same_answers(model, read_back, inputs_of(tiny_processor(), mixed_rows()))


@pytest.mark.slow
def test_int8_is_a_third_and_answers_alike(onnx, tmp_path):
    model = AgeVlmForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    processor = AgeVlmProcessor.from_pretrained(CHECKPOINT)
    main([str(CHECKPOINT), str(tmp_path / "out"), "--int8"])
    exported = ExportedAgeVlm.from_pretrained(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.onnx.data"))
    assert size < 0.36 * sum(parameter.nbytes for parameter in model.parameters())  # the head has its own copy
    image = Image.open(ROOT / "docs" / "images" / "example.png").convert("RGB")
    inputs = inputs_of(processor, [(question, [image]) for question in QUESTIONS])
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    wanted, given = model.generate(**inputs, **options), exported.generate(**inputs, **options)
    first = inputs["input_ids"].shape[1]
    assert torch.equal(given.sequences[:, first], wanted.sequences[:, first])
    cosine = torch.nn.functional.cosine_similarity(given.logits[0], wanted.logits[0], dim=-1)
    assert (cosine > 0.99).all()
