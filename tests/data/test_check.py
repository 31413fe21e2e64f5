"""The doctor beyond single rows: repetitions, lengths as training has them, pictures of evaluation sets, workers."""

import io
import json

import pytest
from bad_rows import encoded, photo, turns
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from agevlm.data.cli import check as main
from agevlm.data.published.check import check
from agevlm.data.published.overlap import SIMILAR_BITS, difference_hash, read_evaluation_pictures
from agevlm.data.scenes.build import build_scenes
from builders import tiny_processor


def write_set(folder, pictures: dict[str, Image.Image], rows=None):
    """A LLaVA-style file with one row for each picture, or `rows`."""
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        (folder / name).write_bytes(encoded(picture, "JPEG", quality=90))
    rows = rows or [{"id": name, "image": name, "conversations": turns()} for name in pictures]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def bits(a, b) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(difference_hash(a), difference_hash(b), strict=True))


def variants(picture: Image.Image) -> list[Image.Image]:
    """The picture smaller, stretched, badly compressed, in gray, darker."""
    small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
    stretched = picture.resize((picture.width, picture.height * 2))
    worse = Image.open(io.BytesIO(encoded(picture, "JPEG", quality=15)))
    return [small, stretched, worse, picture.convert("L").convert("RGB"), picture.point(lambda value: value * 0.7)]


def test_the_hash_knows_a_picture_again_and_tells_others_apart():
    pictures = [photo(seed, (320, 240)) for seed in range(60)]
    same = [bits(picture, other) for picture in pictures for other in variants(picture)]
    different = [bits(a, b) for index, a in enumerate(pictures) for b in pictures[:index]]
    assert sum(distance <= SIMILAR_BITS for distance in same) >= 0.95 * len(same)
    assert min(different) > 2 * SIMILAR_BITS
    assert difference_hash(Image.new("RGB", (50, 50), "white")) is None


def test_overlap_with_evaluation_sets(tmp_path):
    photos = {f"{n}.jpg": photo(n, (320, 240)) for n in range(6)}
    source = write_set(tmp_path / "train", {**photos, "white.jpg": Image.new("RGB", (64, 64), "white")})
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "same.jpg").write_bytes((tmp_path / "train" / "1.jpg").read_bytes())
    (tmp_path / "pope" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "pope" / "white.png").write_bytes(encoded(Image.new("RGB", (90, 90), "white"), "PNG"))
    (tmp_path / "bench").mkdir()
    small = photo(4, (320, 240)).resize((200, 150))
    table = Dataset.from_dict({"picture": [photo(77), small]}, features=Features({"picture": ImageFeature()}))
    table.to_parquet(tmp_path / "bench" / "test.parquet")
    report = check(source, against=[tmp_path / "pope", tmp_path / "bench"], out=tmp_path / "r", progress=False)
    listed = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["kind"], entry["detail"]) for entry in listed] == [
        ("1.jpg", "evaluation_same", "1.jpg is pope/same.jpg"),
        ("4.jpg", "evaluation_similar", "4.jpg is bench/test.parquet row 1"),
    ]
    assert report["problems"] == 2
    assert report["evaluation_pictures"] == {"files": 5, "unreadable": 1}


def test_evaluation_folders_without_pictures_are_refused(tmp_path):
    for folder, message in (("nowhere", "is no folder"), ("empty", "holds no pictures")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            read_evaluation_pictures([tmp_path / folder], progress=False)


def test_repetitions(tmp_path):
    rows = [
        {"id": "a", "image": "0.jpg", "conversations": turns()},
        {"id": "a", "image": "0.jpg", "conversations": turns()},
        {"id": "a", "image": "1.jpg", "conversations": turns()},
        {"id": "a", "image": "nowhere.jpg", "conversations": turns()},
        {"id": "b", "image": "copy.jpg", "conversations": turns()},
    ]
    source = write_set(tmp_path / "set", {"0.jpg": photo(0), "1.jpg": photo(1), "copy.jpg": photo(0)}, rows)
    report = check(source, progress=False)
    found = {kind: value["rows"] for kind, value in report["findings"].items()}
    # Row 4 repeats an id too, but it is lost for its picture already.
    assert found == {"duplicate_row": 1, "duplicate_id": 1, "image_missing": 1, "duplicate_picture": 2}
    assert (report["rows_read"], report["rows_good"]) == (5, 3)


def test_lengths_are_those_of_training(tmp_path):
    """Counted by the tokenizer alone, a row has the tokens that the processor gives it, pictures included."""
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "checkpoint")
    rows = [
        {"id": str(n), "image": "0.jpg", "conversations": turns(answer="word " * 10 * n + "end")} for n in range(8)
    ]
    source = write_set(tmp_path / "set", {"0.jpg": photo(0)}, rows)
    expected = []
    for row in rows:
        messages = [
            {"role": "user", "content": "<|image|>What is this?"},
            {"role": "assistant", "content": row["conversations"][1]["value"]},
        ]
        text = processor.apply_chat_template(messages)
        expected.append(processor(images=[photo(0)], text=text, return_tensors="pt").input_ids.shape[1])
    middle = expected[4]
    report = check(source, checkpoint=tmp_path / "checkpoint", max_length=middle, progress=False)
    assert report["tokens"]["longest"] == max(expected)
    assert report["tokens"]["mean"] == round(sum(expected) / len(expected), 1)
    assert report["findings"]["too_long"]["rows"] == sum(length > middle for length in expected) == 3
    with pytest.raises(ValueError, match="nowhere is neither a folder nor"):
        check(source, checkpoint=tmp_path / "nowhere", progress=False)


def test_workers_find_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("agevlm.data.published.check._CHUNK", 7)
    rows = [{"id": str(n % 20), "image": f"{n % 5}.jpg", "conversations": turns(answer=f"{n}")} for n in range(30)]
    source = write_set(tmp_path / "set", {f"{n}.jpg": photo(n) for n in range(4)}, rows)
    reports = [check(source, workers=w, out=tmp_path / f"r{w}", progress=False) for w in (1, 2)]
    assert reports[0] == reports[1]
    assert (tmp_path / "r1" / "rows.jsonl").read_bytes() == (tmp_path / "r2" / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="r1 exists"):
        check(source, out=tmp_path / "r1", progress=False)


@pytest.mark.parametrize("name", ["a [red]b", "[/x]", "[bold]c[/bold]", "d\\[e]"])
def test_names_are_shown_as_they_are(name, tmp_path, monkeypatch, capsys):
    """Rich would take what stands in brackets for its markup, and end at a tag that closes nothing."""
    monkeypatch.setenv("COLUMNS", "250")
    rows = [{"id": "0", "image": f"{name}/gone.jpg", "conversations": turns()}]
    main([str(write_set(tmp_path / name, {"0.jpg": photo(0)}, rows)), "--workers", "1"])
    text = capsys.readouterr().out
    assert f"row 1: {name}/gone.jpg is in none of" in text and "image_missing" in text
    assert "rows.jsonl: 0 of 1 rows are good" in text and "give --checkpoint" in text


def test_a_folder_of_scenes_is_checked_part_by_part(tmp_path):
    scenes = build_scenes(tmp_path / "scenes", captions=4, instructions=4, test=0, size=64, progress=False)
    with pytest.raises(ValueError, match=r"each part of its rows; name one: \S+/captions or \S+/instructions"):
        check(scenes, progress=False)
    report = check(scenes / "captions", workers=1, progress=False)
    assert (report["rows_good"], report["rows_read"]) == (4, 4)
