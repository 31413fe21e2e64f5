"""Generation: batches equal single rows, runs go on where they stopped, bad rows are recorded."""

import json
from unittest.mock import Mock

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature

from agevlm.evaluation import inputs
from agevlm.evaluation.generate import generate_predictions
from agevlm.evaluation.looking import measure_looking
from agevlm.evaluation.pope import PAPER
from builders import mask, picture, stored


NOUNS = ["apple", "red car", "very small yellow house on the left", "tree", "cup", "blue cup"]
IDENTITY = {"model": "tiny"}


def undecoded(data: Dataset, **columns) -> Dataset:
    """`data` with columns of stored pictures."""
    for name, pictures in columns.items():
        data = data.remove_columns([name] if name in data.column_names else []).add_column(name, pictures)
        data = data.cast_column(name, ImageFeature(decode=False))
    return data


def rows(broken: tuple[int, ...] = (), nouns=NOUNS) -> Dataset:
    images = [stored(picture(seed=index)) for index in range(len(nouns))]
    for index in broken:
        images[index]["bytes"] = images[index]["bytes"][:200]
    data = {
        "id": [f"row-{index}" for index in range(len(nouns))],
        "question": [f"Is there a {noun} in the image?" for noun in nouns],
        "answer": ["yes", "no"] * (len(nouns) // 2),
        "category": ["random"] * len(nouns),
    }
    return undecoded(Dataset.from_dict(data), image=images)


def generate(model, processor, data, folder, **settings):
    """The predictions."""
    settings = {"identity": IDENTITY, "batch_size": 2, "max_new_tokens": 4, "progress": False, **settings}
    return generate_predictions(model, processor, PAPER, data, folder, **settings)[0]


def masks(*marked: int) -> list[dict | None]:
    return [stored(mask(box=(8, 8, 60, 70))) if index in marked else None for index in range(len(NOUNS))]


class Stopping:
    """A model that dies at its n-th batch."""

    def __init__(self, model, batches):
        self.model, self.left, self.rows = model, batches, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, **batch):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.rows += len(batch["input_ids"])
        return self.model.generate(**batch)


def test_batches_equal_single_rows(model, processor, tmp_path):
    single = generate(model, processor, rows(), tmp_path / "single", batch_size=1)
    batched = generate(model, processor, rows(), tmp_path / "batched", batch_size=len(NOUNS))
    assert single == batched
    assert len({line["output"] for line in single}) > 1, "all outputs equal: the test shows nothing"
    assert [line["id"] for line in single] == rows()["id"]
    assert single[0]["prompt"] == "Is there a apple in the image? Please answer yes or no."


def test_a_picture_is_decoded_and_encoded_once_also_when_looking_is_measured(model, processor, tmp_path, monkeypatch):
    """Six questions about two pictures: the answers of six copies, two pictures opened and two in the tower."""
    images = [rows()[index]["image"] for index in (0, 1, 1, 0, 1, 0)]
    data = undecoded(rows(), image=images, mask=masks(1, 2, 5))
    opened, encoded = {name: Mock(wraps=getattr(inputs, name)) for name in ("open_image", "open_mask")}, []
    for name, counted in opened.items():
        monkeypatch.setattr(inputs, name, counted)
    watch = model.model.vision_tower.embeddings.register_forward_hook(lambda *call: encoded.append(len(call[1][0])))
    shared = generate(model, processor, data, tmp_path / "shared", batch_size=6, looks=True)
    assert encoded == [2] and opened["open_image"].call_count == 2 and opened["open_mask"].call_count == 3
    monkeypatch.setattr("agevlm.evaluation.generate.picture_key", lambda row: row["id"])
    assert generate(model, processor, data, tmp_path / "apart", batch_size=6) == shared
    assert encoded == [2, 6]
    watch.remove()
    assert len({line["output"] for line in shared}) > 1
    for module in (model.model, model.model.vision_tower):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_looks_are_those_of_a_pass_without_answers_and_change_no_answer(model, processor, tmp_path):
    data = undecoded(rows(), mask=masks(0, 2, 3))
    settings = {"identity": IDENTITY, "batch_size": 3, "max_new_tokens": 4, "progress": False}
    predictions, looks = generate_predictions(model, processor, PAPER, data, tmp_path, looks=True, **settings)
    assert predictions == generate(model, processor, rows(), tmp_path / "unlooked", batch_size=3)
    _, expected = measure_looking(model, processor, data, progress=False)
    assert [look["id"] for look in looks] == ["row-0", "row-2", "row-3"]
    for look, other in zip(looks, expected, strict=True):
        assert look["uniform"] == other["uniform"] and look["centre"] == other["centre"]
        assert look["in_mask_mass"] == pytest.approx(other["in_mask_mass"], rel=1e-4)
    lines = (tmp_path / "grounding.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == looks
    # A look that is missing is measured again with its row; a mask that cannot be used costs its look alone.
    (tmp_path / "grounding.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30], encoding="utf-8")
    again = Stopping(model, batches=1)
    assert generate_predictions(again, processor, PAPER, data, tmp_path, looks=True, **settings)[0] == predictions
    assert again.rows == 1
    bad = undecoded(data, mask=[{"bytes": b"no picture", "path": None}] * len(data))
    answered, looks = generate_predictions(model, processor, PAPER, bad, tmp_path / "bad", looks=True, **settings)
    assert answered == predictions and looks == []


def test_predictions_are_on_disk_as_returned(model, processor, tmp_path):
    predictions = generate(model, processor, rows(), tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == predictions


@pytest.mark.parametrize("tail", ["", '{"id": "row-4", "prom'], ids=["clean", "cut-off"])
def test_a_stopped_run_goes_on(model, processor, tmp_path, tail):
    whole = generate(model, processor, rows(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        generate(Stopping(model, batches=2), processor, rows(), tmp_path / "stopped")
    path = tmp_path / "stopped" / "predictions.jsonl"
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
    with path.open("a", encoding="utf-8") as file:
        file.write(tail)
    second = Stopping(model, batches=99)
    assert generate(second, processor, rows(), tmp_path / "stopped") == whole
    assert second.rows == 2
    assert path.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()


def test_a_finished_run_asks_nothing(model, processor, tmp_path):
    whole = generate(model, processor, rows(), tmp_path)
    assert generate(Stopping(model, batches=0), processor, rows(), tmp_path) == whole


def test_a_broken_picture_is_recorded_and_tried_again(model, processor, tmp_path):
    predictions = generate(model, processor, rows(broken=(1, 4)), tmp_path)
    assert [line["verdict"] == "skipped" for line in predictions] == [False, True, False, False, True, False]
    assert "row-1" in predictions[1]["error"] and "cannot be decoded" in predictions[1]["error"]
    repaired = Stopping(model, batches=99)
    predictions = generate(repaired, processor, rows(), tmp_path)
    assert repaired.rows == 2
    assert not any(line["verdict"] == "skipped" for line in predictions)


def test_strict_stops_at_a_broken_picture(model, processor, tmp_path):
    with pytest.raises(ValueError, match="row row-1, field image"):
        generate(model, processor, rows(broken=(1,)), tmp_path, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": {"model": "other"}}, "'tiny' there, 'other' asked"),
        ({"max_new_tokens": 5}, "max_new_tokens: 4 there"),
    ],
)
def test_another_runs_folder_is_refused(model, processor, tmp_path, change, message):
    generate(model, processor, rows(), tmp_path)
    with pytest.raises(ValueError, match=message):
        generate(model, processor, rows(), tmp_path, **change)


def test_answers_to_other_questions_are_refused(model, processor, tmp_path):
    generate(model, processor, rows(), tmp_path)
    with pytest.raises(ValueError, match="line 1 answers 'Is there a apple in the image"):
        generate(model, processor, rows(nouns=["pear", *NOUNS[1:]]), tmp_path)


def test_a_damaged_line_is_named(model, processor, tmp_path):
    generate(model, processor, rows(), tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], "?" + lines[1], *lines[2:]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        generate(model, processor, rows(), tmp_path)


def test_ids_must_be_unique(model, processor, tmp_path):
    data = rows().remove_columns("id").add_column("id", ["same"] * len(NOUNS))
    with pytest.raises(ValueError, match="6 rows have 1 different ids"):
        generate(model, processor, data, tmp_path)


@pytest.mark.parametrize("token", ["<|image|>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>"])
def test_a_question_that_spells_a_control_token_is_skipped_and_listed(model, processor, tmp_path, token):
    """It would be a second picture's place, or end the question and begin another turn."""
    data = rows(nouns=["apple", f"{token} token", "cup", "tree"])
    lines = generate(model, processor, data, tmp_path, batch_size=4)
    assert [line["verdict"] == "skipped" for line in lines] == [False, True, False, False]
    assert f"row row-1: the text holds {token!r}, a control token" in lines[1]["error"]
    alone = generate(model, processor, data.select([0, 2, 3]), tmp_path / "alone", batch_size=4)
    assert alone == [lines[0], *lines[2:]]
    with pytest.raises(ValueError, match="row row-1: the text holds"):
        generate(model, processor, data, tmp_path / "strict", strict=True)
