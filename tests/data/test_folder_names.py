"""Tables lie in folders of any name: `datasets` reads a path as a pattern, in which `[1]` is a set of letters."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from agevlm.analysis.pairs import load_pairs
from agevlm.data.masks import load_masks, masks_of
from agevlm.data.rows import MASK_FEATURES, ROW_FEATURES
from agevlm.data.tables import find_files, load_table, read_files
from agevlm.evaluation.looking import load_masked
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.sources import load_local
from agevlm.training.streaming import load_shards
from builders import mask, picture


ROWS = [
    {
        "id": f"r{number}",
        "images": [picture(seed=number)],
        "messages": [
            {"role": "user", "content": "<|image|>What?"},
            {"role": "assistant", "content": f"text {number}"},
        ],
    }
    for number in range(2)
]
MASKS = [
    {"id": row["id"], "query": "text", "message_index": 1, "mask": mask(), "source": "s", "score": 1.0} for row in ROWS
]
QUESTION = {"image": picture(), "mask": mask(), "question": "Is it?", "answer": "yes", "category": "random"}
QUESTIONS = [{"id": name, **QUESTION} for name in ("qa", "qb")]
CARD = """---
configs:
- config_name: default
  data_files:
  - split: kept
    path: data/kept.parquet
  - split: rejected
    path: data/rejected-*.parquet
---
"""


@pytest.fixture(params=["plain", "runs[1]", "a*b?{c}"])
def folder(request, tmp_path):
    """A folder of training rows, masks beside them, a set with a card, one of `save_to_disk`, and others whose name
    the folder's fits as a pattern."""
    root = tmp_path / request.param
    (tmp_path / "runs1" / "data").mkdir(parents=True)
    Dataset.from_list([{"id": "wrong"}]).to_parquet(tmp_path / "runs1" / "data" / "kept.parquet")
    for place, rows, features in (
        ("set/data/kept", MASKS, MASK_FEATURES),
        ("set/data/rejected-0", MASKS[:1], MASK_FEATURES),
        ("rows/captions/train-0", ROWS, ROW_FEATURES),
        ("rows/masks/captions", MASKS, MASK_FEATURES),
        ("questions/pope", QUESTIONS, None),
    ):
        path = root / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(path)
    (root / "set" / "README.md").write_text(CARD)
    Dataset.from_list(MASKS, features=MASK_FEATURES).save_to_disk(root / "disk")
    (root / "rows.jsonl").write_text("".join(json.dumps({"id": row["id"]}) + "\n" for row in ROWS))
    return root


def test_tables_open_in_a_folder_of_any_name(folder, monkeypatch):
    ids = ["r0", "r1"]
    assert read_files([folder / "rows.jsonl"])["id"] == ids
    assert load_table(str(folder / "set" / "data" / "kept.parquet"))["id"] == ids
    assert load_table(str(folder / "rows" / "captions"))["id"] == ids
    assert load_table(str(folder / "disk"))["id"] == ids
    assert load_table(str(folder / "set"), usual=("kept",))["id"] == ids
    assert load_table(str(folder / "set"), "rejected")["id"] == ids[:1]
    with pytest.raises(ValueError, match="no split 'train'; use one of kept, rejected"):
        load_table(str(folder / "set"))
    assert load_masks([folder / "set", folder / "disk"])["id"] == ids * 2
    assert find_files(folder, "rows/*/train-*.parquet") == [str(folder / "rows" / "captions" / "train-0.parquet")]
    assert masks_of(folder / "rows", "captions")["id"] == ids
    monkeypatch.chdir(folder)
    assert read_files([Path("set/data/kept.parquet")])["id"] == ids
    assert load_table("set", "kept")["id"] == ids and os.getcwd() == str(folder)


def test_rooms_open_their_tables_there_too(folder):
    shards = load_shards(str(folder / "rows"), "captions", 1.0)
    assert [row["guidance"]["query"] for row in shards] == ["text", "text"]
    pairs, _ = load_pairs(folder / "rows" / "captions" / "train-0.parquet", 2)
    assert [pair.text for pair in pairs] == ["text 0", "text 1"]
    assert load_masked(folder / "questions" / "pope.parquet")["id"] == ["qa", "qb"]
    assert load_local(BENCHMARKS["pope"]["paper"], folder / "questions")["id"] == ["qa", "qb"]
