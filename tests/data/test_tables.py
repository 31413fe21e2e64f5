"""Splits of a folder, told by the names of files and folders, and columns: in whatever reads tables."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agevlm.data.masks import load_masks
from agevlm.data.published.sources import open_source
from agevlm.data.tables import load_table
from agevlm.evaluation.looking import load_masked
from agevlm.grounding import cli
from agevlm.language import read_held_text
from agevlm.training.curve import read_questions
from agevlm.training.streaming import open_shards


def written(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
        pq.write_table(pa.table({"id": [str(number)], "messages": [turns]}), folder / name)
    return folder


LAYOUTS = {
    "shards": [f"{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")],
    "data": [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")],
    "files": ["eval.parquet", "training.parquet", "val.parquet"],
    "folders": ["dev/0.parquet", "train/0.parquet"],
    "configuration": ["default/test/0000.parquet", "default/train/0000.parquet"],
    "named": ["a_test_2.parquet", "a_train_2.parquet"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_split_train_is_taken_and_the_others_are_named(tmp_path, layout, capsys):
    names = LAYOUTS[layout]
    folder = written(tmp_path / "set", names)
    train = [name for name in names if "train" in name]
    opened = open_source(folder, None, tmp_path)
    assert opened.paths == [folder / name for name in train]
    said = capsys.readouterr().err
    assert "the split train is used" in said and all(name in said for name in names)
    assert load_table(str(folder))["id"][:] == [str(names.index(name)) for name in train]
    other = "validation" if layout == "folders" else "test"
    assert load_table(str(folder), split=other)["id"][:] == ["0"]


@pytest.mark.parametrize(
    "names", [["a.parquet", "b.parquet"], ["latest.parquet", "contrain.parquet"], ["test.parquet"]]
)
def test_files_of_one_split_are_taken_without_a_word(tmp_path, names, capsys):
    folder = written(tmp_path / "set", names)
    assert len(open_source(folder, None, tmp_path).paths) == len(load_table(str(folder))) == len(names)
    assert "split" not in capsys.readouterr().err.replace("Generating train split", "")


@pytest.mark.parametrize("names, message", [
    (["rows.parquet", "val.parquet"], "no split 'train', but none: rows.parquet; validation: val.parquet"),
    (["one/train.parquet", "two/train.parquet"], "several configurations .one, two."),
])  # fmt: skip
def test_what_is_not_clear_is_refused_by_name(tmp_path, names, message):
    folder = written(tmp_path / "set", names)
    for opening in (lambda: open_source(folder, None, tmp_path), lambda: load_table(str(folder))):
        with pytest.raises(ValueError, match=message):
            opening()


def test_json_files_have_splits_too(tmp_path):
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text('[{"id": "a"}]')
    assert open_source(tmp_path, None, tmp_path / "work").paths == [tmp_path / "train.json"]


READERS = {
    "shards": lambda place, _: open_shards([place]),
    "masks": lambda place, _: load_masks([place]),
    "masked rows": lambda place, _: load_masked(place),
    "rows of masks": lambda place, _: load_masked(place, rows_of=place),
    "held text": lambda place, _: read_held_text(place, None),
    "questions": lambda place, _: read_questions(place),
    "ground": lambda place, out: cli.ground([place, "--output", out, "--backend", "exact", "--masks", place]),
    "ground import": lambda place, out: cli.import_coco([place, "--rows", place, "--output", out]),
    "ground export": lambda place, out: cli.export_coco([place, "--output", out]),
    "ground quality": lambda place, out: cli.quality([place, "--against", place, "--output", out]),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_column_that_is_missing_is_named_with_its_file(tmp_path, reader):
    """Rows as LLaVA's JSON has them, given as they are, have other columns than ours."""
    place, out = tmp_path / "rows.parquet", tmp_path / "out"
    pq.write_table(pa.table({"conversations": ["Hi"], "picture": ["a.png"]}), place)
    with pytest.raises(ValueError, match=r"rows\.parquet: no column .*, which is needed; there are conv\w+, picture$"):
        READERS[reader](str(place), str(out))
    assert not out.exists()
