"""The public question files, where they lie at hand: the folder AGEVLM_BENCHMARK_DATA, else shared/data beside the
repository. Tests skip without them.
"""

import json
import os
from pathlib import Path

import pytest


FOLDER = Path(
    os.environ.get("AGEVLM_BENCHMARK_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)


def public_file(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{name} is not at hand (AGEVLM_BENCHMARK_DATA names the folder)")
    return path


def public(name: str) -> list:
    text = public_file(name).read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
