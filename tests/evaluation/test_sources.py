"""Rows from files: the published question files, Parquet, JSON and TSV in their columns, and what is refused."""

import base64
import json

import pytest
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from public_data import public_file

from agevlm.evaluation.inputs import RowError, row_image
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import choose, load_published, parse_places
from agevlm.evaluation.sources import load_hub, load_local
from builders import picture, stored


POPE, OCRBENCH, CVBENCH = (BENCHMARKS[name]["paper"] for name in ("pope", "ocrbench", "cvbench"))


PNG = stored(picture())["bytes"]


@pytest.mark.parametrize(
    ("name", "protocol", "count"),
    [("pope", "paper", 9000), ("ocrbench", "paper", 1000), ("hallusionbench", "paper", 951),
     ("hallusionbench", "official", 1129)],
)  # fmt: skip
def test_the_public_files_load_as_they_are(name, protocol, count):
    folder = public_file("HallusionBench.json").parent
    public_file("coco_pope_random.json"), public_file("OCRBench.json")
    benchmark = BENCHMARKS[name][protocol]
    rows = load_local(benchmark, folder)
    assert len(rows) == count == len(set(rows["id"]))
    assert all(benchmark.prompt(row) and benchmark.gold(row) for row in rows.remove_columns("image"))
    asked_as_text = sum(image is None for image in rows["image"])
    assert asked_as_text == (178 if protocol == "official" else 0)
    with pytest.raises(RowError, match="cannot be decoded"):  # the pictures are not there
        row_image(next(row for row in rows if row["image"] is not None))


def pope_lines(**changes) -> list[dict]:
    row = {"question_id": 1, "image": "a.png", "text": "Is there a cup in the image?", "label": "yes"}
    return [{**row, **changes}, {**row, "question_id": 2, "label": "no", **changes}]


def write_json(folder, name, rows):
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def test_json_lines_name_pictures_in_their_folder(tmp_path):
    write_json(tmp_path, "coco_pope_popular.json", pope_lines())
    (tmp_path / "a.png").write_bytes(PNG)
    rows = load_local(POPE, tmp_path)
    assert rows["id"] == ["popular-1", "popular-2"] and rows["category"] == ["popular"] * 2
    assert row_image(rows[0]).tobytes() == picture().tobytes()


def test_parquet_in_the_published_columns(tmp_path):
    data = {
        "idx": [0, 1], "type": ["2D"] * 2, "task": ["Count"] * 2, "question": ["How many?"] * 2,
        "choices": [["1", "2"]] * 2, "answer": ["(A)", "(B)"], "prompt": ["How many? (A) 1 (B) 2"] * 2,
        "source": ["COCO"] * 2, "image": [stored(picture())] * 2,
    }  # fmt: skip
    Dataset.from_dict(data).cast_column("image", ImageFeature()).to_parquet(tmp_path / "cvbench.parquet")
    rows = load_local(CVBENCH, tmp_path)
    assert rows["id"] == ["0", "1"] and rows[0]["choices"] == ["1", "2"]
    assert row_image(rows[1]).size == picture().size
    assert load_published([CVBENCH], parse_places([f"cvbench={tmp_path / 'cvbench.parquet'}"]))["cvbench"]["id"]


def test_tsv_holds_pictures_as_base64_and_lists_as_json(tmp_path):
    image = base64.b64encode(PNG).decode()
    assert len(image) > 1000
    text = "dataset\tquestion\tquestion_type\tanswer\timage\n" + f'SROIE\twhat?\tKIE\t"[""a"", ""b""]"\t{image}\n' * 2
    (tmp_path / "ocrbench.tsv").write_text(text, encoding="utf-8")
    rows = load_local(OCRBENCH, tmp_path)
    assert rows["id"] == ["000000", "000001"] and rows[0]["answer"] == ["a", "b"]
    assert row_image(rows[0]).tobytes() == picture().tobytes()


def test_a_hub_data_set_is_a_path_to_datasets(tmp_path, monkeypatch):
    """Without the network: `load_dataset` is given a local Parquet folder in place of the Hub id, and is asked for the
    published id, configuration and split."""
    rows = {"question": ["Is it?"], "answer": ["yes"], "category": ["random"], "question_id": ["1"],
            "image": [stored(picture())]}  # fmt: skip
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "test.parquet")
    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return load_dataset(str(tmp_path), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("agevlm.evaluation.sources.load_dataset", load)
    assert load_hub(POPE)["id"] == ["random-1"]
    assert asked == [("lmms-lab/POPE", "default", "test")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"question_id": 1, "image": "a.png", "text": "?", "labels": "yes"}],
         r"coco_pope_random\.json: pope lacks the columns answer; it has .*labels"),
        ([{"image": "a.png", "text": "?", "label": "yes"}], "lacks the column question_id, which numbers its rows"),
        (pope_lines(image="../secret.png"), r"row 0, field image: path '\.\./secret\.png' leaves its folder"),
        (pope_lines(image="/etc/passwd"), "leaves its folder"),
        ([["a list"]], "expected a list of objects"),
        ([], "cannot be read|holds no rows"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, lines, message):
    write_json(tmp_path, "coco_pope_random.json", lines)
    with pytest.raises(ValueError, match=message):
        load_local(POPE, tmp_path)


def test_an_empty_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r"put one of pope\.parquet, .*coco_pope_random\.json"):
        load_local(POPE, tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        parse_places([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match="unknown benchmark mmlu"):
        parse_places(["mmlu=somewhere"])
    assert parse_places([str(tmp_path), "pope=lmms-lab/POPE"])["pope"] == "lmms-lab/POPE"
    assert set(parse_places([str(tmp_path)])) == {b.name for b in choose(["all"])}
