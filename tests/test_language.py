"""Language ability: the measurement against a naive one, its texts, and what the stages do to it."""

import math

import pytest
import torch
from datasets import Dataset

from agevlm import language
from agevlm.analysis.subjects import Subject
from agevlm.conversion.twin import concatenating_twin
from agevlm.language import HeldText, perplexity, read_held_text
from builders import tiny_model, tiny_processor, tiny_scenes, tiny_tokenizer
from vlms import EVERY


TEXT = HeldText("held", (("", "A blue car and a green tree. " * 9), ("Is there a car?", " Yes"), ("", "Nö")))


def naive(model, tokenizer, held):
    """Log likelihoods one token at a time, in float64, each from its window alone."""
    model, start = model.double(), tokenizer.bos_token_id
    total, number = 0.0, 0
    for given, predicted in held.texts:
        before, tokens = (tokenizer.encode(text, add_special_tokens=False) for text in (given, predicted))
        for place, token in enumerate(tokens):
            seen = torch.tensor([[start, *before, *tokens[place - place % language.WINDOW : place]]])
            with torch.no_grad():
                logits = model(input_ids=seen).logits[0, -1]
            total -= logits.log_softmax(-1)[token].item()
            number += 1
    size = sum(len(predicted.encode()) for _, predicted in held.texts)
    return {
        "perplexity": math.exp(total / number),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": number,
        "bytes": size,
    }


def test_it_is_that_of_one_token_at_a_time(monkeypatch):
    monkeypatch.setattr(language, "WINDOW", 32)
    monkeypatch.setattr(language, "BATCH_TOKENS", 70)
    found = perplexity(tiny_model(), tiny_tokenizer(), TEXT)
    assert found["tokens"] > 64 and found["bytes"] == 9 * 29 + 4 + 3
    assert found == pytest.approx(naive(tiny_model(), tiny_tokenizer(), TEXT), rel=1e-5)


@pytest.mark.parametrize("kind", [*EVERY, "twin"])
def test_every_model_is_measured_and_left_as_it_was(kind):
    subject = EVERY[kind]() if kind in EVERY else Subject(*concatenating_twin(tiny_model(), tiny_processor()))
    subject.model.train()
    found = perplexity(subject.model, subject.processor.tokenizer, TEXT)
    assert found == perplexity(subject.model, subject.processor.tokenizer, TEXT)
    assert 100 < found["perplexity"] < 1000 and subject.model.training


def test_texts_come_from_files_tables_and_scenes(tmp_path):
    processor = tiny_processor()
    (tmp_path / "held.txt").write_text("Eins, zwei.\nDrei.", encoding="utf-8")
    found = read_held_text(tmp_path / "held.txt", processor)
    assert found.texts == (("", "Eins, zwei.\nDrei."),) and found.stated["text"] == "held.txt"
    Dataset.from_dict({"text": ["One.", "", "Two."]}).to_parquet(tmp_path / "rows.parquet")
    assert read_held_text(tmp_path / "rows.parquet", processor).texts == (("", "One.\n\n\n\nTwo."),)

    tiny_scenes(tmp_path / "scenes", test=8, size=96, max_objects=3)
    scenes = read_held_text(tmp_path / "scenes", processor)
    assert len(scenes.texts) == 8 and {answer for _, answer in scenes.texts} == {"Yes", "No"}
    given = scenes.texts[0][0]
    assert "Scene: A" in given and "<|image|>" not in given and not given.startswith("<|begin_of_text|>")
    assert perplexity(tiny_model(), processor.tokenizer, scenes)["bytes"] == sum(len(a) for _, a in scenes.texts)


def test_places_without_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9 noir")  # Latin-1
    Dataset.from_dict({"line": ["One."]}).to_parquet(tmp_path / "rows.parquet")
    for name, message in (
        ("empty.txt", "holds no text"),
        ("bytes.txt", r"bytes\.txt is no UTF-8 \(byte 3: .*\); store it as UTF-8"),
        ("rows.parquet", "rows.parquet: no column text, which is needed; there are line"),
    ):
        with pytest.raises(ValueError, match=message):
            read_held_text(tmp_path / name, tiny_processor())
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        perplexity(tiny_model(), tokenizer, TEXT)
