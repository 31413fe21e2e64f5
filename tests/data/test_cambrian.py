"""Conversion: the same bytes whatever the format, workers and interruptions; archives, refusals, flat memory."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from bad_rows import encoded, photo, turns, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import FORK

from agevlm.data.published.convert import convert
from agevlm.data.published.json_records import plan_chunks, read_records
from agevlm.data.published.pictures import PictureStore, decode_picture
from agevlm.data.published.records import BadRow, read_record


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.blake2b(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def write_rows(folder: Path, count: int = 40, name: str = "rows.jsonl") -> Path:
    """Rows with a picture each, every fourth of text alone, every seventh with a missing picture."""
    (folder / "coco").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        path = folder / "coco" / f"{index}.jpg"
        rows.append({"id": f"r{index}", "image": f"coco/{index}.jpg", "conversations": turns()})
        if index % 4 == 3:
            rows[-1] = {"id": f"r{index}", "conversations": turns("Hello?", f"Hello {index}.")}
        elif index % 7 != 6:
            path.write_bytes(encoded(photo(index), "JPEG"))
    text = json.dumps(rows, indent=1) if name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ---- Records of a file ----

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=12), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 5), st.integers(1, 40))
def test_records_are_the_elements_from_any_chunk_on(tmp_path_factory, values, indent, ascii_only, size, block):
    """An array and a JSONL file of the same values give the same records, wherever blocks of the file end."""
    from agevlm.data.published import json_records

    folder = tmp_path_factory.mktemp("records")
    array, lines = folder / "rows.json", folder / "rows.jsonl"
    array.write_text("\ufeff" + json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    lines.write_text("\n\n".join(json.dumps(v, ensure_ascii=ascii_only) for v in values), encoding="utf-8")
    before, json_records._BLOCK = json_records._BLOCK, 4 * block  # `is_array` needs the first character
    try:
        for path in (array, lines):
            chunks = plan_chunks(path, size)
            assert [chunk.count for chunk in chunks] == [
                len(values[i : i + size]) for i in range(0, len(values), size)
            ]
            read = [json.loads(record) for chunk in chunks for _, record in read_records(path, chunk)]
            assert read == values
            limited = plan_chunks(path, size, limit=3)
            assert sum(chunk.count for chunk in limited) == min(3, len(values))
    finally:
        json_records._BLOCK = before


@pytest.mark.parametrize(
    ("text", "good"), [('[{"a": 1}, {"a": 2', 1), ('[{"a": 1}]}, {"a": 2}]', 1), ("[1, , 2]", 2), ("[]", 0)]
)
def test_a_damaged_array_gives_what_is_whole(tmp_path, text, good):
    path = tmp_path / "rows.json"
    path.write_text(text)
    whole = 0
    for _, record in read_records(path):
        try:
            json.loads(record)
            whole += 1
        except ValueError:
            pass
    assert whole == good


def test_an_element_without_end_is_refused(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[{"a": "' + b"x" * (17 * 2**20))
    with pytest.raises(ValueError, match=r"rows.json: the element of the array at byte 1 is longer"):
        plan_chunks(tmp_path / "rows.json", 10)


# ---- The result ----


def test_the_result_depends_on_neither_format_nor_workers(tmp_path):
    lines = write_rows(tmp_path)
    array = write_rows(tmp_path, name="rows.json")
    one = convert(lines, tmp_path / "one", rows_per_shard=6, progress=False)
    two = convert(lines, tmp_path / "two", rows_per_shard=6, workers=2, progress=False)
    other = convert(array, tmp_path / "array", rows_per_shard=6, progress=False)
    assert one == two
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    shards = [name for name in digests(tmp_path / "one") if name.endswith(".parquet")]
    assert len(shards) == one["shards"] == 7
    assert [digests(tmp_path / "one")[n] for n in shards] == [digests(tmp_path / "array")[n] for n in shards]
    assert {k: v for k, v in one.items() if k != "conversion"} == {k: v for k, v in other.items() if k != "conversion"}
    assert (one["read"], one["dropped"]) == (40, {"image_missing": 4})
    assert one["sources"] == {"coco": {"dropped": 4, "rows": 26}, "text": {"rows": 10}}


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    """Killed amid the ids, amid the shards, before the end. Finished shards are not written again."""
    source, _ = write_corpus(tmp_path / "corpus")
    whole = tmp_path / "whole"
    convert(source, whole, rows_per_shard=4, progress=False)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    moments = ["work/ids-00005.npy", "work/report-00006.json", "summary.json"]
    kept: dict[str, int] = {}
    for moment in moments:
        process = FORK.Process(target=lambda: convert(source, out, rows_per_shard=4, progress=False))
        process.start()
        while process.is_alive() and not (partial / moment).exists():
            time.sleep(0.001)
        process.kill()
        process.join()
        if out.exists():
            break  # it was faster
        now = {p.name: p.stat().st_mtime_ns for p in partial.glob("train-*.parquet")}
        assert kept.items() <= now.items()
        kept = now
    convert(source, out, rows_per_shard=4, progress=False)
    assert kept
    assert kept.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("train-*.parquet")}.items()
    assert digests(out) == digests(whole)
    assert not partial.exists()


def test_found_done_or_refused(tmp_path):
    source = write_rows(tmp_path, 8)
    out = tmp_path / "out"
    first = convert(source, out, progress=False)
    before = digests(out)
    assert convert(source, out, progress=False) == first
    with pytest.raises(ValueError, match=r"out holds another conversion \(limit: None there, 3 asked\)"):
        convert(source, out, limit=3, progress=False)
    with pytest.raises(ValueError, match="images: "):
        convert(source, out, images=[tmp_path / "coco"], progress=False)
    assert digests(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="mine is not empty and holds no conversion"):
        convert(source, tmp_path / "mine", progress=False)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        convert(source, tmp_path / "a", images=[tmp_path / "nowhere"], progress=False)
    with pytest.raises(ValueError, match=r"limit \(0\)"):
        convert(source, tmp_path / "a", limit=0, progress=False)
    (tmp_path / "bad.jsonl").write_text("no json\n[]\n")
    with pytest.raises(ValueError, match=r"no row of bad.jsonl is good \(invalid_json 1, not_an_object 1\)"):
        convert(tmp_path / "bad.jsonl", tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match=r"must hold one .json or .jsonl file.*bad.jsonl, rows.jsonl"):
        convert(tmp_path, tmp_path / "a", progress=False)
    assert not list(tmp_path.glob(".a.partial")) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("damage", ["deleted", "cut", "other rows"])
def test_a_shard_that_is_not_whole_is_named(tmp_path, damage):
    source, out = write_rows(tmp_path, 8), tmp_path / "out"
    convert(source, out, rows_per_shard=3, progress=False)
    shard, other = out / "train-00001-of-00003.parquet", out / "train-00002-of-00003.parquet"
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(other.read_bytes() if damage == "other rows" else shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"out has \d rows, its summary" if damage == "other rows" else shard.name):
        convert(source, out, rows_per_shard=3, progress=False)


def test_rows_of_the_same_size_are_another_conversion(tmp_path):
    source, out = write_rows(tmp_path, 8), tmp_path / "out"
    convert(source, out, progress=False)
    source.write_text(source.read_text().replace("A ", "B ", 1))
    with pytest.raises(ValueError, match=r"out holds another conversion \(content: "):
        convert(source, out, progress=False)


def test_strict_leaves_what_another_call_has_begun(tmp_path, monkeypatch):
    source, partial = write_rows(tmp_path, 8), tmp_path / ".out.partial"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("agevlm.data.published.convert._finish", interrupt)
        convert(source, tmp_path / "out", progress=False)
    there = digests(partial / "work")
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(source, tmp_path / "out", strict=True, limit=5, progress=False)
    assert digests(partial / "work") == there
    convert(source, tmp_path / "out", progress=False)


def interrupt(*_):
    raise KeyboardInterrupt


def test_two_at_once_are_refused(tmp_path):
    from filelock import FileLock

    source = write_rows(tmp_path, 8)
    (tmp_path / ".out.partial" / "work").mkdir(parents=True)
    with (
        FileLock(tmp_path / ".out.partial" / "work" / "lock"),
        pytest.raises(ValueError, match="another process is converting"),
    ):
        convert(source, tmp_path / "out", progress=False)
    convert(source, tmp_path / "out", progress=False)


def test_limit_takes_the_first_rows(tmp_path):
    source = write_rows(tmp_path)
    summary = convert(source, tmp_path / "out", limit=10, rows_per_shard=4, progress=False)
    assert (summary["read"], summary["shards"], summary["dropped"]) == (10, 3, {"image_missing": 1})


# ---- Where pictures are found ----


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("sam/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


@pytest.fixture
def archive() -> tuple[dict[str, bytes], bytes]:
    prefix = "mnt/disks/storage/data/pretrain_data/2.5m_v2/"
    files = {
        "./sam/a.jpg": encoded(photo(1), "JPEG"),
        "sam/B.jpg": encoded(photo(2), "JPEG"),
        f"{prefix}allava/c.jpg": encoded(photo(3), "JPEG"),
        "../evil.jpg": encoded(photo(4), "JPEG"),
    }
    return files, tar_of(files)


@pytest.mark.parametrize("form", ["tar", "parts", "gz"])
def test_pictures_in_archives(tmp_path, archive, form):
    files, data = archive
    root = tmp_path / "root"
    root.mkdir()
    roots = [root]
    if form == "tar":
        (root / "all.tar").write_bytes(data)
    elif form == "parts":  # as `split` cuts it, in the middle of pictures; 10 comes after 2
        step = len(data) // 11 + 1
        for number in range(11):
            (root / f"all.tar_part{number}").write_bytes(data[number * step : (number + 1) * step])
    else:
        (tmp_path / "all.tar.gz").write_bytes(gzip.compress(data))
        roots.append(tmp_path / "all.tar.gz")
    store = PictureStore(roots, tmp_path / "work")
    assert store.read("sam/a.jpg") == (files["./sam/a.jpg"], None)
    assert store.read("./sam/a.jpg") == (files["./sam/a.jpg"], None)
    found, note = store.read("SAM/b.JPG")
    assert found == files["sam/B.jpg"] and note[0] == "image_miscased"
    found, note = store.read("allava/c.jpg")
    assert found.startswith(b"\xff\xd8") and note[0] == "image_relocated"
    for path, kind in (
        ("sam/link.jpg", "image_missing"),
        ("../evil.jpg", "image_path_outside"),
        ("evil.jpg", "image_missing"),
    ):
        with pytest.raises(BadRow, match=kind):
            store.read(path)


def test_a_damaged_archive_is_named(tmp_path, archive):
    (tmp_path / "all.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match=r"all.tar: no complete tar archive"):
        PictureStore([tmp_path], tmp_path / "work").read("sam/a.jpg")


def test_no_index_where_all_paths_are_exact(tmp_path):
    """Listing millions of files, perhaps over a network, is for those who need it."""
    source = write_rows(tmp_path, 4)
    store = PictureStore([tmp_path], tmp_path / "work")
    for index in range(3):
        store.read(f"coco/{index}.jpg")
    assert source.exists() and not (tmp_path / "work").exists()
    with pytest.raises(BadRow, match="image_missing"):
        store.read("coco/nowhere.jpg")
    assert (tmp_path / "work" / "pictures.sqlite").exists()


def test_the_first_root_that_has_it_wins(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(encoded(photo(seed), "JPEG"))
    (tmp_path / "b" / "y.jpg").write_bytes(b"y")
    store = PictureStore([tmp_path / "a", tmp_path / "b"], tmp_path / "work")
    assert store.read("x.jpg")[0] == (tmp_path / "a" / "x.jpg").read_bytes()
    assert store.read("y.jpg")[0] == b"y"


def test_an_unreadable_file_is_a_bad_row(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"x")
    (tmp_path / "x.jpg").chmod(0)
    if os.access(tmp_path / "x.jpg", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(BadRow, match="image_unreadable"):
        PictureStore([tmp_path], tmp_path / "work").read("x.jpg")


MODES = {"JPEG": "RGB", "PNG": "RGBA", "GIF": "P", "TIFF": "RGB", "WEBP": "RGB", "BMP": "RGB", "JPEG2000": "RGB"}
PICTURES = {kind: encoded(photo(3).convert(mode), kind) for kind, mode in MODES.items()}
FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PICTURES)), FLIPS, st.floats(0.05, 1))
def test_whatever_is_damaged_a_picture_is_decoded_or_a_bad_row(kind, flips, length):
    """Bytes changed, most of them in the header, and the end cut off: no exception ends a run of millions of rows."""
    data = bytearray(PICTURES[kind])
    for place, value in flips:
        data[int(place**3 * (len(data) - 1))] = value
    try:
        picture, _ = decode_picture(bytes(data[: max(1, int(length * len(data)))]), "x.jpg")
        assert picture.mode == "RGB"
    except BadRow as error:
        assert error.kind.startswith("image_")


# ---- Texts ----


def test_a_single_picture_comes_first_several_stay_where_they_are():
    def content(question, images):
        return read_record({"id": "a", "image": images, "conversations": turns(question)}, 1).messages[0]["content"]

    assert content("<image>\nWhat?", "a.jpg") == "<|image|>What?"
    assert content("What?\n<image>", "a.jpg") == "<|image|>What?"
    assert content("Look <image> here", ["a.jpg"]) == "<|image|>Look\nhere"
    assert content("<image>", "a.jpg") == "<|image|>"
    assert content("Compare <image> with <image>.", ["a", "b"]) == "Compare <|image|> with <|image|>."
    second = [*turns("Hi"), *turns("And <image>?")]
    messages = read_record({"image": "a.jpg", "conversations": second}, 1).messages
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hi", "<|image|>And\n?"]


def test_messages_with_parts():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}, {"type": "image"}]
    record = {"images": [{"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}],
              "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]}  # fmt: skip
    draft = read_record(record, 5)
    assert draft.messages[0] == {"role": "user", "content": "<|image|>What?<|image|>"}
    assert (draft.id, [kind for kind, _ in draft.notes]) == ("row-5", ["id_missing", "multi_image"])


# ---- Memory ----

MEASURED = """
import resource, sys
from agevlm.data.published.convert import convert
convert(sys.argv[1], sys.argv[2], progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Peak memory for 64 MB and for 512 MB of rows of text; `bench/data.py` has larger ones, and pictures."""
    peaks = []
    for megabytes in (64, 512):
        path = tmp_path / f"{megabytes}.jsonl"
        with path.open("w") as file:
            for index in range(megabytes * 250):
                file.write(json.dumps({"id": f"r{index}", "conversations": turns("Hello?", "word " * 770)}) + "\n")
        out = str(tmp_path / f"out-{megabytes}")
        peaks.append(int(subprocess.check_output([sys.executable, "-c", MEASURED, str(path), out])))
    assert peaks[1] < peaks[0] + 100 and peaks[1] < 1000, peaks
