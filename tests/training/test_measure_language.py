"""Language ability before and after a stage: kept while the Llama is frozen, and across interruptions."""

import json

import pytest
import torch
from training_worker import Stop, StopAt, make_rows, quick

from agevlm.conversion.twin import concatenating_twin
from agevlm.language import perplexity, read_held_text
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.training import callbacks
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import STAGES
from builders import tiny_model, tiny_processor


@pytest.fixture
def held(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("A blue car and a green tree on the left of a yellow house. " * 5, encoding="utf-8")
    return path


def run(stage, output, held, callbacks=(), variant="agevlm", start=None, **changes):
    recipe = quick(STAGES[stage](size="tiny", variant=variant), rows=4, max_steps=4, save_steps=2, **changes)
    model, processor = start or (tiny_model(), tiny_processor())
    return run_stage(
        recipe, output, data=make_rows(), model=model, processor=processor, language=held, callbacks=callbacks
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_llama_keeps_its_language_to_the_last_bit(tmp_path, held, stage):
    language = run(stage, tmp_path / "run", held).lineage["language"]
    text = read_held_text(held, tiny_processor())
    assert language["before"] == perplexity(tiny_model(), tiny_processor().tokenizer, text)
    trained = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    assert language["after"] == perplexity(trained, tiny_processor().tokenizer, text)
    blocks = [
        model.model.language_model.cross_attention_layers[0].mlp.up_proj.weight for model in (trained, tiny_model())
    ]
    assert not torch.equal(*blocks), "the cross blocks have trained"
    assert (language["before"] == language["after"]) == (stage != "stage4_instruct")
    assert json.loads((tmp_path / "run" / "agevlm_stage.json").read_text())["language"] == language
    before, after = (f"{language[when]['perplexity']:.4g}" for when in ("before", "after"))
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| language before -> after | perplexity {before} -> {after} (held.txt) |" in card


def test_measuring_changes_nothing_else(tmp_path, held):
    measured, plain = (run("stage4_instruct", tmp_path / name, text) for name, text in (("a", held), ("b", None)))
    assert measured.lineage["recipe_hash"] == plain.lineage["recipe_hash"]
    assert "language" not in plain.lineage and "language before" not in (tmp_path / "b" / "README.md").read_text()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_an_interrupted_run_keeps_the_number_measured_before(tmp_path, held, monkeypatch):
    with pytest.raises(Stop):
        run("stage4_instruct", tmp_path / "run", held, [StopAt(3)])
    first = json.loads((tmp_path / "run" / "agevlm_stage.json").read_text())["language"]
    assert first["before"]["perplexity"] > 1 and first["after"] is None
    other = tmp_path / "other.txt"
    other.write_text("Another text.")
    with pytest.raises(ValueError, match=r"holds another held text \(text: 'held\.txt' there, 'other\.txt' asked"):
        run("stage4_instruct", tmp_path / "run", other)
    measured = []
    monkeypatch.setattr(callbacks, "perplexity", lambda *args: measured.append(perplexity(*args)) or measured[-1])
    language = run("stage4_instruct", tmp_path / "run", held).lineage["language"]
    assert language == {**first, "after": measured[0]} and len(measured) == 1
    assert language == run("stage4_instruct", tmp_path / "whole", held).lineage["language"]


def test_the_twin_is_measured_too(tmp_path, held):
    start = concatenating_twin(tiny_model(), tiny_processor())
    language = run("stage1_align", tmp_path / "run", held, variant="twin", start=start, mask_fraction=0.0).lineage[
        "language"
    ]
    assert language["before"] == language["after"]
