"""Whole folders: deterministic for any number of processes, complete, never overwritten, with the public columns."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agevlm.data.cli import scenes as main
from agevlm.data.rows import MAX_PHRASES, open_row, validate_row
from agevlm.data.scenes.arguments import SPLITS, SceneArguments
from agevlm.data.scenes.benchmarks import BENCHMARKS
from agevlm.data.scenes.build import build_scenes, load_benchmark, load_rows
from agevlm.data.scenes.builder import SceneBuilder
from agevlm.data.scenes.objects import COLORS
from agevlm.data.scenes.splits import is_held_out_pair
from agevlm.images import open_image
from agevlm.training.parts import NAMES


SMALL = {"captions": 30, "instructions": 30, "test": 12, "size": 96, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_scenes(tmp_path_factory.mktemp("scenes") / "out", **SMALL)


def tables(folder):
    return {path.relative_to(folder): pq.read_table(path) for path in sorted(folder.rglob("*.parquet"))}


def test_result_does_not_depend_on_the_number_of_processes(folder, tmp_path):
    again = build_scenes(tmp_path / "again", num_proc=2, **SMALL)
    first, second = tables(folder), tables(again)
    assert first.keys() == second.keys()
    assert all(first[name].equals(second[name]) for name in first)
    assert (again / "contact_sheet.png").read_bytes() == (folder / "contact_sheet.png").read_bytes()


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_workers_that_cannot_start_are_an_error(source, tmp_path):
    """A worker imports the main script: without a guard that would start workers itself, and a pipe cannot be read."""
    code = (
        "from agevlm.data.scenes.build import build_scenes\n"
        f"build_scenes({str(tmp_path / 'out')!r}, captions=2, instructions=0, test=0, num_proc=2, progress=False)\n"
    )
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    arguments, given = (["-"], code) if source == "standard input" else ([str(tmp_path / "script.py")], None)
    run = subprocess.run([sys.executable, *arguments], input=given, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "ValueError: a worker process ended before its work was done (2 workers)" in run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"script.py"}


def test_another_seed_gives_other_scenes(folder, tmp_path):
    other = build_scenes(tmp_path / "other", **{**SMALL, "test": 0, "instructions": 0}, seed=1)
    first, second = (list(load_rows(path, "captions")["messages"]) for path in (folder, other))
    assert first != second


def test_training_rows_are_valid_and_guided(folder):
    for part in ("captions", "instructions"):
        rows = load_rows(folder, part)
        assert len(rows) == 30 and len(set(rows["id"])) == 30
        for row in rows:
            validate_row(row)
            assert row["guidance"]["source"] == "scenes" and row["images"][0].size == (96, 96)
        roles = [row["messages"][row["guidance"]["message_index"]]["role"] for row in rows]
        assert set(roles) == ({"assistant"} if part == "captions" else {"user", "assistant"})
        phrased = load_rows(folder, part, by_phrase=True)
        assert phrased["messages"] == rows["messages"] and sum(map(len, phrased["guidance"])) > 30
        for row, whole in zip(map(open_row, phrased), map(open_row, rows), strict=True):
            assert 1 <= len(row["guidance"]) <= MAX_PHRASES
            masks = [np.array(phrase["mask"]) for phrase in row["guidance"]]
            (union,) = (np.array(phrase["mask"]) for phrase in whole["guidance"])
            if row["guidance"][0]["message_index"] % 2:  # a caption
                assert np.array_equal(np.logical_or.reduce(masks), union)
            else:
                assert any(np.array_equal(mask, union) for mask in masks)
    some = load_rows(folder, "captions", mask_fraction=0.5)
    assert 0 < sum(g is not None for g in some["guidance"]) < 30


def test_rows_on_presence_alone_ask_for_nothing_else():
    """Behind them a fifth asks for a caption, which stage 4 would unlearn otherwise."""
    builder = SceneBuilder(SceneArguments(size=96, instructions=120, presence_first=0.5))
    rows = [builder.instruction_row(index)[0]["messages"] for index in range(120)]
    assert all(turn["content"] in ("Yes", "No") for row in rows[:60] for turn in row[1::2])
    captions = [row for row in rows[60:] if row[1]["content"].endswith(".")]
    assert 5 <= len(captions) <= 20 and all(len(row) == 2 for row in captions)


def test_manifest_describes_the_folder(folder):
    manifest = json.loads((folder / "scenes.json").read_text())
    for name, count in manifest["counts"].items():
        path = folder / (f"{name}.parquet" if name.startswith("benchmarks") else f"{name}/train.parquet")
        assert pq.read_metadata(path).num_rows == count
    assert manifest["arguments"]["size"] == 96 and manifest["colours"] == list(COLORS)
    assert all(is_held_out_pair(*pair) for pair in manifest["held_out"]["pairs"])
    assert Image.open(folder / "contact_sheet.png").width > 1000


def test_identical_folder_is_reused_and_any_other_is_refused(folder, tmp_path):
    before = (folder / "scenes.json").stat().st_mtime_ns
    assert build_scenes(folder, **SMALL) == folder
    assert (folder / "scenes.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="seed: 0 there, 5 asked"):
        build_scenes(folder, **SMALL, seed=5)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds no scenes"):
        build_scenes(tmp_path, **SMALL)


@pytest.mark.parametrize("name", ["captions/train", "masks/instructions", "phrases/captions", "benchmarks/name/pope"])
def test_a_file_that_is_missing_is_named(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / f"out/{name}.parquet").unlink()
    with pytest.raises(ValueError, match=f"{name}.parquet is missing"):
        build_scenes(tmp_path / "out", **SMALL)


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("agevlm.data.scenes.build.draw_contact_sheet", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_scenes(tmp_path / "out", **{**SMALL, "captions": 1, "instructions": 1, "test": 0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["hous"] * 6}, "did you mean 'house'"),
        ({"colors": ["gren"]}, "did you mean 'green'"),
        ({"size": 8}, "size is 8"),
        ({"max_objects": 11}, "max_objects is 11"),
        ({"min_objects": 3, "max_objects": 2}, "min_objects is 3; use 1 to max_objects, 2"),
        ({"word_rate": 2}, "word_rate is 2"),
        ({"cutouts": "nowhere"}, "cutouts.json"),
        ({"backgrounds": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_bad_arguments(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_scenes(tmp_path / "out", **{**SMALL, **changes})


def test_command_line_gives_the_same_scenes(tmp_path, capsys):
    few = {"captions": 3, "instructions": 2, "test": 4, "size": 96}
    again = build_scenes(tmp_path / "again", **few, progress=False)
    flags = [text for name in few for text in (f"--{name}", str(few[name]))]
    main(["--output", str(tmp_path / "out"), *flags, "--workers", "1"])
    assert "contact_sheet.png" in capsys.readouterr().out
    assert (tmp_path / "out/scenes.json").read_text() == (again / "scenes.json").read_text()
    first, second = tables(tmp_path / "out"), tables(again)
    assert first.keys() == second.keys() and all(first[name].equals(second[name]) for name in first)


def test_clutter(tmp_path):
    """Six to ten small things of a dozen names: every caption counts right, every benchmark has its questions."""
    build = {**SMALL, "captions": 5, "instructions": 10, "test": 4, "size": 224, "min_objects": 6, "max_objects": 10}
    del build["progress"]
    out = build_scenes(tmp_path / "out", **build, names=NAMES, progress=False)
    builder = SceneBuilder(SceneArguments(**build, names=NAMES))
    pictures = [builder.picture(random.Random(n), builder.pools["train"], word_rate=0) for n in range(20)]
    counts = [len(picture.scene.objects) for picture in pictures]
    assert 5 < sum(counts) / 20 < 10 and max(counts) <= 10
    assert all(0.14 <= thing.extent <= 0.24 for picture in pictures for thing in picture.scene.objects)
    assert len(load_rows(out, "instructions")) == 10 and len(load_benchmark(out, "composition", "pope")) == 4
    with pytest.raises(ValueError, match="min_objects"):
        build_scenes(tmp_path / "out", **{**build, "min_objects": 1}, names=NAMES, progress=False)


def test_rows_on_presence_alone_come_first(tmp_path):
    """Guided unless all of their answers are no; the other rows are those of before."""
    build = {**SMALL, "captions": 0, "test": 0, "instructions": 40}
    rows, before = (
        load_rows(build_scenes(tmp_path / str(share), presence_first=share, **build), "instructions")
        for share in (0.5, 0.0)
    )
    for index, row in enumerate(rows):
        asked = [turn["content"] for turn in row["messages"][::2]]
        alone = all(text.removeprefix("<|image|>").startswith("Is there a") for text in asked)
        assert alone if index < 20 else row["messages"] == before[index]["messages"]
        answers = {turn["content"] for turn in row["messages"][1::2]}
        assert (row["guidance"] is None) == (answers == {"No"})
    assert sum(row["messages"][1]["content"] == "Yes" for row in rows) > 5


def test_few_names_and_one_object(tmp_path):
    """What a tower is trained on: no benchmarks, one object in every picture, a handful of names."""
    names = ["apple", "car", "star", "key", "bus", "bell", "tree", "cup"]
    out = build_scenes(
        tmp_path / "out", captions=20, instructions=0, test=0, max_objects=1, names=names, colors=["red", "blue"],
        word_rate=0, size=64, progress=False,
    )  # fmt: skip
    rows = load_rows(out, "captions")
    for row in rows:
        assert re.search(
            r"\ba (red|blue) (apple|car|star|key|bus|bell|tree|cup)\b", row["messages"][1]["content"].lower()
        )
    assert len(load_rows(out, "instructions")) == 0 == len(load_benchmark(out, "name", "pope"))


def test_unknown_parts_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="part is 'caption'"):
        load_rows(folder, "caption")
    with pytest.raises(ValueError, match="benchmark is 'pop'"):
        load_benchmark(folder, "name", "pop")
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(tmp_path, "captions")


def test_photographs_as_backgrounds(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        Image.new("RGB", (150, 120), (40 * number, 200, 90)).save(photos / f"{number}.png")
    out = build_scenes(tmp_path / "out", **{**SMALL, "test": 2, "instructions": 0}, backgrounds=photos)
    rows = load_rows(out, "captions")
    borders = {round(np.median(np.asarray(row["images"][0])[:, :3, 0]) / 40) for row in rows}
    assert borders == {1, 2, 3}  # the first and fifth photograph are for tests
    Image.new("RGB", (150, 120)).save(photos / "0.png")
    (photos / "9.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"background 9\.png"):
        build_scenes(tmp_path / "out", **{**SMALL, "test": 2, "instructions": 0}, backgrounds=photos)


COLUMNS = {
    "pope": {"question_id", "question", "answer", "image", "category", "image_source"},
    "cvbench": {"idx", "type", "task", "image", "question", "choices", "answer", "prompt", "filename", "source",
                "source_dataset", "source_filename"},
    "ocrbench": {"dataset", "question", "question_type", "answer", "image"},
    "hallusionbench": {"category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note", "question_id",
                       "question", "gt_answer_details", "gt_answer", "filename", "image"},
    "realworldqa": {"image", "question", "answer", "image_path"},
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmark_columns_and_masks(folder, split, benchmark):
    rows = load_benchmark(folder, split, benchmark)
    assert set(rows.column_names) == COLUMNS[benchmark] | {"id", "mask", "held_out_pair"}
    assert len(rows) == 12 == len(set(rows["id"]))
    for row in rows:
        assert row["mask"] is None or (row["mask"].mode, row["mask"].size) == ("1", row["image"].size)
        assert split == "composition" or not row["held_out_pair"]
    if benchmark in ("ocrbench", "realworldqa"):
        assert all(mask is not None for mask in rows["mask"])


def test_pope_rows(folder):
    for split in SPLITS:
        rows = load_benchmark(folder, split, "pope")
        assert Counter(rows["answer"]) == {"yes": 6, "no": 6}
        assert set(rows["category"]) == {"random", "popular", "adversarial"}
        for row in rows:
            assert (row["mask"] is None) == (row["answer"] == "no")
            assert re.fullmatch(r"Is there an? .+ in the image\?", row["question"])


def test_cvbench_rows(folder):
    for row in load_benchmark(folder, "style", "cvbench"):
        assert row["prompt"].startswith(f"{row['question']} Select from the following choices.\n(A) ")
        assert row["answer"] in [f"({letter})" for letter in "ABCDEF"[: len(row["choices"])]]
        assert row["type"] == {"Count": "2D", "Relation": "2D", "Depth": "3D"}[row["task"]]
        if row["task"] == "Count":
            counted = row["choices"]["ABCD".index(row["answer"][1])]
            assert (row["mask"] is None) == (counted == "0")


def test_realworldqa_and_ocrbench_rows(folder):
    for row in load_benchmark(folder, "name", "realworldqa"):
        lettered = re.findall(r"^([A-D])\. ", row["question"], re.MULTILINE)
        assert row["question"].endswith("nothing else." if lettered else "single word or number.")
        assert not lettered or row["answer"] in lettered
    for row in load_benchmark(folder, "name", "ocrbench"):
        assert row["answer"][0].isupper() and row["question_type"]


def test_hallusionbench_pairs_follow_from_their_descriptions(folder):
    """gt_answer_details lists the objects from left to right; every answer is found again from it."""
    for split in SPLITS:
        rows = load_benchmark(folder, split, "hallusionbench").to_list()
        for start in range(0, len(rows), 4):
            original, edited = rows[start : start + 2], rows[start + 2 : start + 4]
            assert [r["question"] for r in original] == [r["question"] for r in edited]
            assert original[0]["gt_answer"] != edited[0]["gt_answer"]
            assert len({(r["subcategory"], r["set_id"]) for r in original + edited}) == 1
            assert original[0]["image"]["bytes"] != edited[0]["image"]["bytes"]
        for row in rows:
            text = row["gt_answer_details"].lower()
            if found := re.fullmatch(r"is there an? (.+) in the image\?", row["question"].lower()):
                yes = re.search(rf"\b{found[1]} (at|on|in) the", text) is not None
                assert (row["mask"] is None) == (not yes)
            elif found := re.fullmatch(r"is the (.+) to the (left|right) of the (.+)\?", row["question"].lower()):
                first, second = (re.search(rf"\b{name} (at|on|in) the", text).start() for name in (found[1], found[3]))
                yes = (first < second) == (found[2] == "left")
            else:
                name, color = re.fullmatch(r"is the (.+) (\w+)\?", row["question"].lower()).groups()
                yes = f"{color} {name}" in text
            assert row["gt_answer"] == str(int(yes)), row


def test_stored_pictures_decode(folder):
    table = pq.read_table(folder / "captions/train.parquet").to_pylist()
    assert all(open_image(row["images"][0], row["id"]).size == (96, 96) for row in table)
