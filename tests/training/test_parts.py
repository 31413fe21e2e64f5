"""The committed tiny parts know what their card says, and the command that made them goes on where it was killed."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ConvNextModel, LlamaForCausalLM

from agevlm import TINY_PARTS
from agevlm.data.scenes.build import text_corpus
from agevlm.data.scenes.builder import SceneArguments
from agevlm.processing import AgeVlmProcessor
from agevlm.training import parts, tower
from agevlm.training.parts import COLORS, NAMES, make_small, make_tiny, train_tokenizer
from agevlm.training.parts_card import measure_parts
from agevlm.training.tower import CellReader, Cells
from builders import tiny_model, tiny_tokenizer


SCENES = SceneArguments(size=224, max_objects=3, names=NAMES, colors=COLORS, seed=1000)


def test_the_card_says_what_the_parts_know():
    """On a part of its questions: within four standard errors of the card, and above what issue and recipes need. A
    classifier that is fitted to fewer pictures reads less."""
    card = (TINY_PARTS / "README.md").read_text(encoding="utf-8")
    stated = {name: float(share) / 100 for name, share in re.findall(r"\| (.+?) \| ([\d.]+)% \|", card)}
    figures = measure_parts(TINY_PARTS, SCENES, questions=150, pictures=300)
    measured = {**figures["told"], **figures["cells"]}
    assert measured.keys() == stated.keys()
    for name, share in measured.items():
        error = (max(stated[name] * (1 - stated[name]), 0.01) / 150) ** 0.5
        assert abs(share - stated[name]) < 4 * error, (name, share, stated[name])
    assert stated["presence"] >= 0.95 and stated["name of the thing"] >= 0.85 and stated["color of the thing"] >= 0.98


def test_words_are_tokens_signs_are_spelled_and_any_text_comes_back():
    tokenizer = train_tokenizer(
        m["content"] for messages in text_corpus(300, names=NAMES, colors=COLORS) for m in messages
    )
    for text in ("Is there a red apple in the image?", "Considering the relative positions of the car and the key"):
        assert len(tokenizer.tokenize(text)) == len(re.findall(r"\w+|[^\w\s]", text))
    assert len(tokenizer.tokenize(" STORM")) > 4
    for text in ("grün 木 apple\n\n  x", "The sign says STORM.", "<b>\t</b>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    committed = AgeVlmProcessor.from_pretrained(TINY_PARTS)
    turn = [{"role": "user", "content": "<|image|>Is there a cat?"}, {"role": "assistant", "content": "No"}]
    assert len(committed.tokenizer(committed.apply_chat_template(turn))["input_ids"]) == 11


def test_cells_are_labelled_by_what_covers_them():
    processor = AgeVlmProcessor.from_pretrained(TINY_PARTS)
    data = Cells(replace(SCENES, min_objects=2), 8, processor, pool="composition")
    builder = data.builder
    for index in range(8):
        row = data[index]
        picture = builder.picture(builder.stream(f"cells-{data.pool.names[0]}", index), data.pool, word_rate=0.0)
        for number, thing in enumerate(picture.scene.objects):
            cells = torch.from_numpy(processor.image_processor.mask_to_grid(picture.mask([number])).ravel())
            named = row["names"][cells] == data.names.index(thing.name)
            colored = row["colors"][cells] == data.colors.index(thing.color)
            assert named.equal(colored) and (named.all() or number < len(picture.scene.objects) - 1)
        assert (row["names"] == len(NAMES)).equal(row["colors"] == len(COLORS))


def test_turned_hues_keep_their_names_and_lose_their_colors():
    data = Cells(SCENES, 30, AgeVlmProcessor.from_pretrained(TINY_PARTS))
    rows = [data[index] for index in range(30)]
    shifted = [row for row in rows if (row["colors"] == -100).any()]
    assert 4 < len(shifted) < 22
    assert all((row["names"] < len(NAMES)).any() for row in shifted)
    model = CellReader(ConvNextModel.from_pretrained(TINY_PARTS / "vision_tower"), len(NAMES), len(COLORS))
    assert model(**data.collate(shifted[:2]))["loss"].isfinite()


class Here:
    """A pool that works in this process."""

    def __init__(self, *args, **kwargs): ...
    def __enter__(self):
        return self

    def __exit__(self, *args): ...
    def submit(self, call, *args):
        result = call(*args)
        return type("Future", (), {"result": lambda self: result})()


def photographed(folder: Path, *names: str) -> Path:
    """Cut-outs of one style."""
    for name in names:
        Image.new("RGBA", (80, 80), "red").save(folder / f"{name}.png")
    things = [{"name": name, "style": "photo", "category": "c", "file": f"{name}.png"} for name in names]
    (folder / "cutouts.json").write_text(json.dumps(things), encoding="utf-8")
    return folder


def test_a_folder_of_work_is_of_one_making(tmp_path, monkeypatch):
    """Else the parts of one size, seed or set of cut-outs would be finished as those of another."""
    monkeypatch.setattr(parts, "ProcessPoolExecutor", Here)
    pictures = SceneArguments(cutouts=photographed(tmp_path, *"abcdefgh"))
    identity = parts._identity("small", pictures, {"conversations": 3, "scenes": 4, "seed": 5})
    for _ in range(2):
        assert parts._train_both(tmp_path / "work", identity, lambda: "tower", lambda: "language") == (
            "language",
            "tower",
        )
    changed = [
        {**identity, **change} for change in ({"size": "tiny"}, {"seed": 6}, {"scenes": 5}, {"conversations": 9})
    ]
    photographed(tmp_path, *"abcdefghi")
    changed.append(parts._identity("small", pictures, {"conversations": 3, "scenes": 4, "seed": 5}))
    for other in changed:
        with pytest.raises(ValueError, match="work holds another training of parts"):
            parts._train_both(tmp_path / "work", other, lambda: "tower", lambda: "language")

    def at_once():
        parts._train_both(tmp_path / "work", identity, lambda: "tower", lambda: "language")

    with pytest.raises(ValueError, match="another run is writing"):
        parts._train_both(tmp_path / "work", identity, at_once, lambda: "language")


@pytest.mark.parametrize("kind", ["icons", "cutouts"])
def test_cells_are_measured_on_pictures_that_the_tower_has_not_seen(tmp_path, monkeypatch, kind):
    """Of cut-outs, which have no colors, the unseen pairs are all pairs: with one seed they were the same pictures."""
    scenes, asked = replace(SCENES, size=96), []
    if kind == "cutouts":
        scenes = replace(scenes, names=None, colors=None, cutouts=photographed(tmp_path, *"abcdefgh"))
    processor = AgeVlmProcessor.from_pretrained(TINY_PARTS)

    def remember(vision, data):
        asked.append({data[index]["image"].tobytes() for index in range(len(data))})
        if len(asked) == 2:
            raise InterruptedError
        return torch.zeros(1, 1), {}

    monkeypatch.setattr(tower, "_cells", remember)
    with pytest.raises(InterruptedError):
        tower.cell_accuracy(ConvNextModel.from_pretrained(TINY_PARTS / "vision_tower"), processor, scenes, 12)
    trained = Cells(scenes, 40, processor)
    trained.hue_shifted = 0.0
    fitted, tested = asked
    assert len(fitted) == 12 and len(tested) == 4 and not fitted & tested
    assert not (fitted | tested) & {trained[index]["image"].tobytes() for index in range(40)}


@pytest.mark.parametrize("killed", ["tower", "language"])
def test_a_killed_command_goes_on(tmp_path, monkeypatch, killed):
    """What was finished is not trained again; the folder comes last and whole."""
    calls = []

    def train(kind, work):
        calls.append(kind)
        if kind == killed and calls.count(kind) == 1:
            raise KeyboardInterrupt
        part = {"tower": ("vision_tower", ConvNextModel), "language": ("language_model", LlamaForCausalLM)}[kind]
        return part[1].from_pretrained(TINY_PARTS / part[0])

    monkeypatch.setattr(parts, "ProcessPoolExecutor", Here)
    once = parts._once
    monkeypatch.setattr(parts, "_once", lambda work, kind, _: once(work, kind, lambda: train(work.name, work)))
    with pytest.raises(KeyboardInterrupt):
        make_tiny(tmp_path / "parts", tmp_path / "work", 160, 64, 0)
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(parts, "measure_parts", lambda *_: {"told": {"presence": 0.5}, "cells": {"name": 0.5}})
    make_tiny(tmp_path / "parts", tmp_path / "work", 160, 64, 0)
    assert calls.count(killed) == 2 and len(calls) == 3
    assert {path.name for path in (tmp_path / "parts").iterdir()} >= {"README.md", "language_model", "vision_tower"}
    assert "| presence | 50.0% |" in (tmp_path / "parts" / "README.md").read_text()


@pytest.mark.timeout(120)
def test_parts_of_size_small(tmp_path, monkeypatch):
    """A pretrained language model goes on, in bfloat16 and in a process of its own; the card says what both can do."""
    photographed(tmp_path, "cat", "dog", "hen", "car", "bus", "key", "jug", "saw")
    model = LlamaForCausalLM(tiny_model().config.text_config)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    monkeypatch.setattr(parts, "smollm2", lambda: (model, tiny_tokenizer()))
    monkeypatch.setattr(parts, "SMALL_CONVERSATIONS", 16)
    monkeypatch.setattr(parts, "SMALL_VISION", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]})
    measured = partial(measure_parts, pictures=8, questions=2)
    monkeypatch.setattr(parts, "measure_parts", lambda folder, scenes, **_: measured(folder, scenes))
    make_small(tmp_path / "parts", tmp_path / "work", tmp_path, scenes=32, seed=0)
    after = LlamaForCausalLM.from_pretrained(tmp_path / "parts/language_model").model.layers[0].mlp.up_proj.weight
    assert after.dtype == torch.float32 and not torch.equal(after, before)
    card = (tmp_path / "parts/README.md").read_text(encoding="utf-8")
    assert "size small" in card and re.search(r"\| presence \| [\d.]+% \|", card) and "| name of the thing | " in card
