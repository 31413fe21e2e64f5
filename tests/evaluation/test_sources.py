"""Rows from files: the published question files, Parquet, JSON and TSV in their columns, and what is refused."""

import base64
import csv
import json

import pytest
from benchmark_rows import ROWS
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from public_data import public_file

from agevlm.evaluation.benchmark import check_row, verdict
from agevlm.evaluation.inputs import row_image
from agevlm.evaluation.registry import BENCHMARKS, EVERY
from agevlm.evaluation.run import load_published, parse_places
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
    with pytest.raises(ValueError, match="cannot be decoded"):  # the pictures are not there
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

    monkeypatch.setattr("agevlm.data.tables.load_dataset", load)
    monkeypatch.setattr("agevlm.evaluation.sources._check_reachable", asked.append)
    assert load_hub(POPE)["id"] == ["random-1"]
    assert asked == ["lmms-lab/POPE", ("lmms-lab/POPE", "default", "test")]


BIG = base64.b64encode(PNG).decode()
# (file, columns, two rows of which the second names the picture of the first, prompt and gold answer of the second)
TABLES = {
    "pope": ("POPE.tsv", "index image question answer category",
             [("0", BIG, "Is there a cup? Please answer yes or no.", "Yes", "random"),
              ("1", "0", "Is there a cat? Please answer yes or no.", "No", "popular,random")],
             "Is there a cat? Please answer yes or no.", "no"),
    "hallusionbench": ("HallusionBench.tsv", "index image question answer category l2-category",
                       [("a_VD_ocr_0_1_0", BIG, "Is it?", "Yes", "VD", "VD_ocr"),
                        ("a_VS_map_0_2_1", "a_VD_ocr_0_1_0", "Is it so?", "No", "VS", "VS_map")], "Is it so?", "no"),
    "ocrbench": ("OCRBench.tsv", "index image question answer category",
                 [("0", BIG, "what?", "['CENTRE']", "Regular Text Recognition"),
                  ("1", "0", "formula?", "['x', \"y'\"]", "Handwritten Mathematical Expression Recognition")],
                 "formula?", "x | y'"),
    "cvbench": ("CV-Bench-2D.tsv", "index image question A B C answer category source split prompt",
                [("0", BIG, "How many?", "1", "2", "3", "A", "Count", "COCO", "2D", "How many? (A) 1 (B) 2 (C) 3"),
                 ("1", "0", "Where?", "up", "down", "", "B", "Relation", "COCO", "2D", "Where? (A) up (B) down")],
                "Where? (A) up (B) down", "B"),
    "realworldqa": ("RealWorldQA.tsv", "index image question A B C D answer",
                    [("0", BIG, "How many?", "", "", "", "", "3"),
                     ("1", "0", "Which way?", "Left", "Straight", "Right", "", "C")],
                    "Question: Which way?\nOptions:\nA. Left\nB. Straight\nC. Right\n"
                    "Please select the correct answer from the options above. \n", "C"),
}  # fmt: skip


def write_table(folder, file, columns, rows):
    with (folder / file).open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter="\t").writerows([columns.split(), *rows])


@pytest.mark.parametrize("name", TABLES)
def test_the_files_of_vlmevalkit_load_as_they_are(tmp_path, name):
    file, columns, lines, prompt, gold = TABLES[name]
    write_table(tmp_path, file, columns, lines)
    benchmark = BENCHMARKS[name]["paper"]
    rows = load_local(benchmark, tmp_path)
    assert rows["id"] == [line[0] for line in lines]
    assert benchmark.prompt(rows[1]) == prompt and benchmark.gold(rows[1]) == gold
    assert row_image(rows[1]).tobytes() == row_image(rows[0]).tobytes() == picture().tobytes()
    assert verdict(benchmark, rows[1], benchmark.parse(rows[1], gold.split(" | ")[0])) == "correct"
    assert benchmark.query(rows[1]) in prompt and not benchmark.query(rows[1]).startswith("Question: ")


def test_a_table_of_vlmevalkit_without_a_column_says_how_to_map_it(tmp_path):
    write_table(tmp_path, "HallusionBench.tsv", "index image question answer", [("0", BIG, "Is it?", "Yes")])
    with pytest.raises(ValueError, match=r"HallusionBench\.tsv cannot be read: .*lacks the column l2-category"):
        load_local(BENCHMARKS["hallusionbench"]["paper"], tmp_path)


LISTED = """configs:
- config_name: default
  data_files:
  - split: test
    path: data/test-*
"""


@pytest.mark.parametrize("card", ["license: mit\n", LISTED, None], ids=["card", "files", "no card"])
@pytest.mark.parametrize("name", ["snap", "snap[1]"])
def test_a_snapshot_of_the_hub_is_read_as_load_dataset_reads_it(tmp_path, monkeypatch, name, card):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name / "data").mkdir(parents=True)
    if card is not None:
        (tmp_path / name / "README.md").write_text(f"---\n{card}---\n")
    shards = [tmp_path / name / "data" / f"test-{index:05d}-of-00003.parquet" for index in range(3)]
    for index, shard in enumerate(shards):
        row = {"question_id": [index], "question": ["q"], "answer": ["yes"], "category": ["random"]}
        data = Dataset.from_dict({**row, "image": [stored(picture())]}).cast_column("image", ImageFeature())
        data.to_parquet(shard)
    rows = load_local(POPE, tmp_path / name)
    assert rows["id"] == ["random-0", "random-1", "random-2"] and row_image(rows[2]).size == picture().size
    with pytest.raises(ValueError, match="is a part of a set; give the folder"):
        load_local(POPE, shards[0])


def test_pictures_may_lie_in_a_folder_of_their_own(tmp_path):
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.png").write_bytes(PNG)
    write_json(tmp_path, "coco_pope_random.json", pope_lines())
    rows = load_published([POPE], {"pope": str(tmp_path)}, tmp_path / "val2014")["pope"]
    assert row_image(rows[0]).tobytes() == picture().tobytes()


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_a_line_break_ends_a_row(tmp_path, sign):
    lines = [{**line, "text": f"a{sign}b"} for line in pope_lines(image="a.png")]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "coco_pope_random.json").write_text(text, encoding="utf-8")
    assert load_local(POPE, tmp_path)["question"] == [f"a{sign}b"] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "expected a list of objects with fields"),
        ("[" * 100_000, "maximum recursion depth"),
        (json.dumps([{"question_id": 10**30, "text": "q"}]), "row 0, field question_id: 1000"),
        (json.dumps(pope_lines(image="!" * 2000)), "row 0, field image: .*Only base64 data"),
        (json.dumps(pope_lines(image="data:image/png;base64,!")), "row 0, field image: .*Only base64 data"),
        (json.dumps(pope_lines(image=BIG[:121])), "row 0, field image: .*base64"),
        (json.dumps(pope_lines(image="https://example.org/a.png")), "row 0, field image: image_url: .*download it"),
        (json.dumps(pope_lines(image=7)), "row 0, field image: expected a path"),
        (json.dumps(pope_lines(label="maybe")), r"row random-1: the right answer is 'maybe', not one of yes, no"),
        (json.dumps(pope_lines(label=None)), "row random-1, field answer: null"),
        (json.dumps(pope_lines(text=None)), "row random-1, field question: null"),
        ("\x00", "Expecting value"),
    ],
)
def test_damaged_files_are_named_with_row_and_field(tmp_path, content, message):
    (tmp_path / "coco_pope_random.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"coco_pope_random\.json.*{message}"):
        load_local(POPE, tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("cvbench", {"answer": "(F)"}), ("hallusionbench", {"gt_answer": "2"}), ("ocrbench", {"answer": []}),
     ("realworldqa", {"answer": " "}), ("pope", {"answer": "unsure"})],
)  # fmt: skip
def test_a_right_answer_that_no_benchmark_knows_is_refused(name, wrong):
    benchmark, row = BENCHMARKS[name]["paper"], ROWS[name]
    check_row(benchmark, row, "here")
    with pytest.raises(ValueError, match="here, row 0: the right answer is"):
        check_row(benchmark, {**row, **wrong}, "here")


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
    with pytest.raises(ValueError, match="no such file or folder"):
        parse_places([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match="unknown benchmark mmlu"):
        parse_places(["mmlu=somewhere"])
    assert parse_places([str(tmp_path), "pope=lmms-lab/POPE"])["pope"] == "lmms-lab/POPE"
    assert set(parse_places([str(tmp_path)])) == set(EVERY) - {"own"}
