"""The corpus of bad rows: the doctor calls each by its name, and the conversion keeps exactly the good ones."""

import gzip
import json
from collections import Counter
from pathlib import Path

import bad_rows
import pyarrow.parquet as pq
import pytest
from bad_rows import encoded, photo, write_corpus

from agevlm.data.cli import check as main
from agevlm.data.published.check import check
from agevlm.data.published.convert import convert
from agevlm.data.published.records import DROPPED, REMARKED, REPAIRED
from agevlm.data.rows import validate_row


UNLISTED = {"text_only", "multi_image", "duplicate_picture"}
CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "agevlm-tiny"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def diagnosis(written, tmp_path_factory):
    """The doctor's report and, for each row, the names of what was found."""
    source, cases = written
    out = tmp_path_factory.mktemp("doctor") / "report"
    report = check(source, checkpoint=CHECKPOINT, max_length=256, out=out, progress=False)
    found = [set() for _ in cases]
    for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found[entry["row"] - 1].add(entry["kind"])
    return report, [tuple(sorted(kinds - UNLISTED)) for kinds in found]


@pytest.fixture(scope="module")
def converted(written, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "captions"
    return out, convert(written[0], out, rows_per_shard=16, progress=False)


def test_the_corpus_is_large_and_covers_every_name():
    cases = bad_rows.corpus(Path("outside"))
    assert sum(bool(case.kinds) for case in cases) >= 60
    named = {kind for case in cases for kind in case.kinds}
    assert not (DROPPED.keys() | REPAIRED.keys() | REMARKED.keys()) - UNLISTED - named


def test_the_doctor_names_every_row(written, diagnosis):
    _, cases = written
    wrong = {
        case.name: (case.kinds, found) for case, found in zip(cases, diagnosis[1], strict=True) if case.kinds != found
    }
    assert not wrong


def test_other_names_and_forms_give_the_row_that_they_say(converted):
    by_id = {row["id"]: row for path in converted[0].glob("train-*") for row in pq.read_table(path).to_pylist()}
    cases = {case.name: place for place, case in enumerate(bad_rows.corpus(Path("outside")))}
    wanted = [{"role": "user", "content": "<|image|>Who?"}, {"role": "assistant", "content": "A cat."}]
    for name in ("roles in conversations", "prompt of turns", "prompt", "query", "texts"):
        assert by_id[f"case-{cases[name]}"]["messages"] == wanted, name
    for name in ("system", "system repeated"):
        assert by_id[f"case-{cases[name]}"]["messages"][0] == {"role": "system", "content": "Be brief."}
    for name in ("data address", "base64", "picture in a part"):
        assert by_id[f"case-{cases[name]}"]["images"] == [{"bytes": encoded(photo(20), "JPEG"), "path": None}], name


SHAPES = {
    "object.json": (json.dumps({"info": {}, "data": [{"id": 1}]}, indent=1), "one object with the fields info, data"),
    "line.json": (json.dumps({"rows": [{"id": 1}]}), "one object with the fields rows"),
    "objects.jsonl": ('{\n"id": 1\n}\n{\n"id": 2\n}', "objects of several lines each"),
    "array.jsonl": ('[\n{"id": 1}\n]', "one JSON array; name it .json"),
    "one.jsonl": ('[{"id": 1}]', "one JSON array; name it .json"),
    "table.json": ("id,image\n1,a.png\n", "begins with .*id,image"),
    "empty.json": (" \n", "is empty"),
    "packed.jsonl": (gzip.compress(b"[]"), "compressed with gzip"),
    "wide.json": ("[]".encode("utf-16"), "is UTF-16"),
    "table.jsonl": (b"PAR1....", "is a Parquet file"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_form_of_a_file_is_named(tmp_path, name):
    content, message = SHAPES[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"{name} .*{message}"):
        check(tmp_path / name, progress=False)


def test_the_report_counts_what_it_lists(written, diagnosis):
    _, cases = written
    report, _ = diagnosis
    assert report["rows_read"] == len(cases)
    assert report["rows_good"] == sum(case.kept for case in cases)
    counts = Counter(kind for case in cases for kind in case.kinds)
    shown = {kind: found["rows"] for kind, found in report["findings"].items() if kind not in UNLISTED}
    assert shown == counts
    assert report["problems"] == sum(
        count for kind, count in counts.items() if kind in DROPPED or kind in ("too_long", "image_behind_cut")
    )
    assert all(found["examples"] and found["meaning"] for found in report["findings"].values())


def test_the_conversion_keeps_exactly_the_good_rows(written, converted):
    from datasets import load_dataset

    _, cases = written
    out, summary = converted
    rows = load_dataset(
        "parquet", data_files=str(out / "train-*.parquet"), split="train", cache_dir=str(out / "cache")
    )
    kept = [place for place, case in enumerate(cases, start=1) if case.kept]
    assert len(rows) == summary["rows"] == len(kept)
    bad = [json.loads(line) for line in (out / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(entry["row"], entry["kind"]) for entry in bad] == [
        (place, case.kinds[0]) for place, case in enumerate(cases, start=1) if not case.kept
    ]
    assert summary["dropped"] == Counter(entry["kind"] for entry in bad)
    repaired = [json.loads(line) for line in (out / "repaired_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(entry["row"], entry["kind"]) for entry in repaired} == {
        (place, kind) for place, case in enumerate(cases, start=1) for kind in case.kinds if kind in REPAIRED
    }
    assert len(set(rows["id"])) == len(rows)
    for row in rows:
        validate_row(row)


def test_doctor_and_conversion_agree_and_a_converted_set_is_healthy(diagnosis, converted):
    out, summary = converted
    assert diagnosis[0]["rows_good"] == summary["rows"]
    again = check(out, progress=False)
    assert again["rows_good"] == again["rows_read"] == summary["rows"]
    assert again["problems"] == 0


def test_a_strict_check_ends_with_status_1(written, converted, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(written[0]), "--strict", "--workers", "1", "--limit", "40", "--out", str(tmp_path / "r")])
    assert ended.value.code == 1
    assert "image_missing" not in capsys.readouterr().out  # behind the limit
    assert json.loads((tmp_path / "r" / "report.json").read_text())["rows_read"] == 40
    main([str(converted[0]), "--strict", "--workers", "1"])  # a healthy set ends as usual
    assert "rows are good" in capsys.readouterr().out


def test_a_strict_conversion_stops_and_leaves_nothing(written, tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl, row 15 .*invalid_json.*leave out strict"):
        convert(written[0], tmp_path / "out", strict=True, progress=False)
    assert list(tmp_path.iterdir()) == []
