"""Files that no sane writer makes: each is read, or refused by name, at once and in little memory."""

import json

import fuzz_worker
import pytest
from workers import run_worker


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
