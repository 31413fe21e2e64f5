"""Published data sets train as they are: what is good in them is trained on, row for row, and nothing else."""

import io
import json

import datasets
import pytest
from bad_rows import encoded, photo, turns, write_corpus
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from rich.console import Console

from agevlm.data.published.prepare import prepare
from agevlm.data.rows import validate_row
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align
from builders import save_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows_of(folder: str) -> list[dict]:
    files = f"{folder}/captions/train-*.parquet"
    return list(datasets.load_dataset("parquet", data_files=files, split="train"))


def test_the_corpus_of_bad_rows_trains_with_the_right_number_of_rows(tmp_path):
    """One row a step: the steps are the rows that survive. Long rows are not cut, so that none loses its picture."""
    source, cases = write_corpus(tmp_path / "corpus")
    save_tiny(tmp_path / "start")
    recipe = stage1_align.recipe(size="tiny").override(
        global_batch_size=1, per_device_train_batch_size=1, max_length=None, save_strategy="no", disable_tqdm=True
    )
    console = Console(file=io.StringIO())
    result = run_stage(recipe, tmp_path / "run", data=source, init_from=tmp_path / "start", console=console)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == sum(case.kept for case in cases)
    assert result.lineage["data"]["rows"] == state["global_step"]
    assert state["epoch"] == 1


def messages_set() -> Dataset:
    """A set as the Hub has them: content as parts, filled up with nulls, and a row that is bad."""
    part = {"type": Value("string"), "text": Value("string")}
    messages = [
        [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"What is {n}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"Number {n}." if n != 2 else ""}]},
        ]
        for n in range(4)
    ]
    features = Features(
        {"images": List(ImageFeature()), "messages": List({"role": Value("string"), "content": List(part)})}
    )
    return Dataset.from_dict({"images": [[photo(n)] for n in range(4)], "messages": messages}, features=features)


@pytest.mark.parametrize("form", ["save_to_disk", "dictionary", "parquet"])
def test_sets_of_messages(tmp_path, form):
    folder = tmp_path / "set"
    if form == "save_to_disk":
        messages_set().save_to_disk(folder)
    elif form == "dictionary":
        datasets.DatasetDict(train=messages_set()).save_to_disk(folder)
    else:
        folder.mkdir()
        messages_set().to_parquet(folder / "train-00000-of-00001.parquet")
    rows = rows_of(prepare(folder, "captions"))
    assert [row["id"] for row in rows] == ["row-1", "row-2", "row-4"]
    assert rows[1]["messages"] == [
        {"role": "user", "content": "<|image|>What is 1?"},
        {"role": "assistant", "content": "Number 1."},
    ]
    for row in rows:
        validate_row(row)


def test_json_beside_its_pictures_is_converted_once(tmp_path, cache, capsys):
    (tmp_path / "jsons").mkdir()
    (tmp_path / "a.jpg").write_bytes(encoded(photo(1), "JPEG"))
    rows = [
        {"id": "a", "image": "a.jpg", "conversations": turns()},
        {"id": "b", "image": "b.jpg", "conversations": turns()},
    ]
    source = tmp_path / "jsons" / "rows.json"
    source.write_text(json.dumps(rows))
    folder = prepare(source, "captions")
    assert "1 rows to train on; dropped: image_missing 1" in capsys.readouterr().out
    assert [row["id"] for row in rows_of(folder)] == ["a"]
    assert prepare(source, "captions") == folder
    assert capsys.readouterr().out == ""
    source.write_text(json.dumps(rows[:1] * 1 + [{"id": "c", "conversations": turns("Hi")}]))
    assert prepare(source, "captions") != folder  # another file, another conversion


@pytest.mark.parametrize(("there", "read"), [("captions", "instructions"), ("instructions", "captions")])
def test_the_part_that_a_stage_reads_is_missing(tmp_path, there, read):
    (tmp_path / there).mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} has no folder {read}, which this stage reads"):
        prepare(tmp_path, read)


def test_a_set_without_a_place_for_masks_is_refused_before_it_is_converted(tmp_path, cache):
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"id": "c", "conversations": turns("Hi")}]))
    told = f"no place for them: `agevlm data import {source} --masks MASKS .*--variant ca-baseline"
    with pytest.raises(ValueError, match=told):
        prepare(source, "captions", guided=True)
    assert not cache.exists()
    assert rows_of(prepare(source, "captions"))


def test_what_is_prepared_already_stays_as_it_is(tmp_path, cache):
    (tmp_path / "captions").mkdir()
    assert prepare(tmp_path, "captions") == str(tmp_path)
    assert prepare("hf://datasets/a/b", "captions") == "hf://datasets/a/b"
    assert not cache.exists()
    (tmp_path / "captions" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="name the folder instructions and give the one above it"):
        prepare(tmp_path / "captions", "instructions")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare("nowhere", "captions")
