"""Files that survive an interruption: atomic writes, identities of folders, journals with torn tails, digests."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agevlm import store


ROWS = st.lists(
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=20), max_size=3), max_size=8
)
KILLED = """
import os, signal, sys
from pathlib import Path
from agevlm import store

with store.{context}(Path(sys.argv[1])) as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_inside(context, path):
    """A process that is killed between its last write and the rename."""
    result = subprocess.run([sys.executable, "-c", KILLED.format(context=context), str(path)], check=False)
    assert result.returncode == -signal.SIGKILL


# ---- Whole or absent ----


def test_a_written_file_is_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "file.json"
    store.write_json(path, {"name": "é", "list": (1, 2)})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é",\n  "list": [\n    1,\n    2\n  ]\n}\n'
    store.write_lines(path, [{"a": 1}, {"a": "é"}])
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"a": "é"}\n'
    store.write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    store.write_text(path, "old")
    with pytest.raises(RuntimeError, match="inside"), store.replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("inside")
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.write_json(path, object())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    store.write_text(path, "old")

    def fail(source, target):
        assert Path(source).read_text() == "new"
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        store.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    """And a temporary one, which the next writer takes over: a table of that folder would be read with it."""
    path = tmp_path / "file.txt"
    store.write_text(path, "old")
    killed_inside("replacing", path)
    assert path.read_text() == "old"
    with store.replacing(path) as temporary:
        assert not temporary.read_bytes()
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_writers_of_one_file_take_turns(tmp_path):
    """Each writes it whole: it holds at any time what one of them has written."""
    path, text = tmp_path / "file.txt", "x" * 10_000

    def write(number: int) -> None:
        with store.replacing(path) as temporary, temporary.open("w") as file:
            for _ in range(3):
                file.write(str(number) + text)
                file.flush()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    content = path.read_text()
    assert content == content[: len(content) // 3] * 3 and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_complete_and_takes_over_from_a_killed_one(tmp_path):
    path = tmp_path / "out"
    killed_inside("new_folder", path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.incomplete"]
    with store.new_folder(path) as temporary:
        assert not path.exists() and not list(temporary.iterdir())
        (temporary / "file").write_text("whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in path.iterdir()] == ["file"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), store.new_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_folder(tmp_path):
    with store.new_folder(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with pytest.raises(ValueError, match=r"another run is writing to .*out"), store.new_folder(tmp_path / "out"):
            pytest.fail("two processes write one folder")
    assert (tmp_path / "out" / "file").read_text() == "first"


# ---- What a folder holds ----


def test_a_locked_folder_is_refused_to_others_and_free_afterwards(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(ValueError, match=f"another run is writing to {re.escape(str(folder))}; wait")
    with store.locked(folder, wait=False), refused, store.locked(folder, wait=False):
        pass
    with store.locked(folder, wait=False), store.locked(tmp_path / "other", wait=False):
        assert folder.is_dir()


@pytest.mark.parametrize("context", ["replacing", "new_folder"])
def test_other_users_can_read_what_a_library_has_closed_to_them(tmp_path, context):
    with getattr(store, context)(tmp_path / "result") as temporary:
        file = temporary / "model.safetensors" if temporary.is_dir() else temporary
        file.write_bytes(b"")
        file.chmod(0o600)
    (tmp_path / "plain").write_bytes(b"")
    found = [path for path in (tmp_path / "result", *tmp_path.rglob("model.safetensors")) if path.is_file()]
    assert [path.stat().st_mode for path in found] == [(tmp_path / "plain").stat().st_mode]


def test_a_folder_is_claimed_once(tmp_path):
    file, identity = tmp_path / "run.json", {"model": "a", "sizes": (1, 2), "training": {"seed": 0, "lr": 1.0}}
    assert not store.claim(file, identity)
    assert store.claim(file, identity)
    other = {"model": "a", "sizes": (1, 2), "training": {"seed": 1}, "limit": 3}
    with pytest.raises(ValueError) as error:
        store.claim(file, other)
    assert str(error.value) == (
        f"{tmp_path} holds another run (training.seed: 0 there, 1 asked; limit: None there, 3 asked; training.lr: 1.0 "
        "there, None asked); choose another folder or delete it"
    )
    assert json.loads(file.read_text()) == store.as_json(identity)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is no valid JSON"):
        store.claim(file, identity)


# ---- Journals ----


@given(batches=st.lists(ROWS, max_size=4))
def test_a_journal_reads_back_what_was_appended(batches):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for rows in batches:
            with store.Journal(path) as journal:
                journal.append(rows)
        assert not batches or store.read_lines(path) == [row for rows in batches for row in rows]


@given(rows=ROWS, more=ROWS, data=st.data())
def test_a_torn_tail_costs_the_torn_row_alone(rows, more, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with store.Journal(path) as journal:
            journal.append(rows)
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        kept = rows[: content[:cut].count(b"\n")]
        assert store.read_lines(path) == kept
        with store.Journal(path) as journal:
            journal.append(more)
        assert store.read_lines(path) == [*kept, *more]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is damaged: .*; delete the file"):
        store.read_lines(path)


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    with store.Journal(path), pytest.raises(ValueError, match="another run is writing to"):
        store.Journal(path)
    store.Journal(path).close()


# ---- Digests ----


def test_digests():
    expected = hashlib.blake2b("aé".encode(), digest_size=16).hexdigest()
    assert store.digest("aé") == store.digest("aé".encode()) == store.digest(iter(["a", "é".encode()])) == expected
    assert store.digest(b"", size=4) == hashlib.blake2b(digest_size=4).hexdigest()
