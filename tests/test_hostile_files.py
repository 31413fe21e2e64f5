"""Files that no sane writer makes: each is read, or refused by name, at once and in little memory."""

import gzip
import json
from pathlib import Path

import fuzz_worker
import pytest
from workers import run_worker

from agevlm.data.published.sources import open_source
from agevlm.data.scenes.objects import CutoutSource
from agevlm.data.tables import read_files
from agevlm.evaluation.leaderboard import read_metrics
from agevlm.evaluation.own_rows import load_own
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.sources import load_local
from agevlm.grounding.annotations import read_annotations
from agevlm.hub_cards.render import add_evaluation
from agevlm.language import read_held_text
from agevlm.models import read_settings
from builders import picture, tiny_processor


def captions(path: Path) -> object:
    """The text beside a picture."""
    picture().save(path.with_suffix(".png"))
    return open_source(path.parent, None, path.parent)


POPE = BENCHMARKS["pope"]["paper"]
READERS = {
    "own.csv": lambda path: load_own(path),
    "own.json": lambda path: load_own(path),
    "rows.jsonl": lambda path: open_source(path, None, path.parent),
    "metadata.csv": lambda path: open_source(path.parent, None, path.parent),
    "caption.txt": captions,
    "pope.json": lambda path: load_local(POPE, path),
    "pope.tsv": lambda path: load_local(POPE, path.parent),
    "coco.json": lambda path: read_annotations([path]),
    "boxes.csv": lambda path: read_annotations([path]),
    "table.jsonl": lambda path: read_files([path]),
    "cutouts.json": lambda path: CutoutSource(path.parent),
    "config.json": lambda path: read_settings(str(path.parent)),
    "metrics.json": read_metrics,
    "result.json": lambda path: add_evaluation(path.parent, path, None),
    "held.txt": lambda path: read_held_text(path, tiny_processor()),
}
FORMS = {
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-16, big end first": lambda text: text.encode("utf-16-be"),
    "gzip": lambda text: gzip.compress(text.encode()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_no_utf8_is_called_what_it_is(tmp_path, name, form):
    path = tmp_path / name
    path.write_bytes(FORMS[form]("image,question,answer\na.png,Is it red?,yes\n"))
    fix = "is compressed with gzip; unpack it" if form == "gzip" else "is UTF-16; store it as UTF-8"
    with pytest.raises(ValueError, match=rf"{name} {fix}"):
        READERS[name](path)


def test_a_mark_in_front_of_utf8_is_no_fault(tmp_path):
    """As Windows writes it."""
    picture().save(tmp_path / "a.png")
    row = {"id": "1", "image": "a.png", "text": "Is there a cup?", "label": "yes", "question_id": 1}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(row), encoding="utf-8-sig")
    assert load_local(POPE, tmp_path)["answer"] == ["yes"]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("pictures", 100),
        ("records", 300),
        ("rows", 500),
        ("questions", 400),
        ("checkpoints", 25),
        pytest.param("pictures", 2000, marks=pytest.mark.slow),
        pytest.param("records", 10_000, marks=pytest.mark.slow),
        pytest.param("rows", 10_000, marks=pytest.mark.slow),
        pytest.param("questions", 10_000, marks=pytest.mark.slow),
        pytest.param("checkpoints", 500, marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, kind, count):
    found = json.loads(run_worker(fuzz_worker, tmp_path / "files", kind, count, 0).splitlines()[-1])
    assert not found["wrong"], found
    assert found["accepted"] and (found["refused"] or kind == "records"), found  # a file of records is never refused
    assert found["megabytes"] < 1000
    assert found["seconds"] < (200 if kind == "records" else 10)  # all records are one file
