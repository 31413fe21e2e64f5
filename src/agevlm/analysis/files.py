"""Folders and files of an analysis."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agevlm.store import replacing


def file_name(name: str) -> str:
    """`name` as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is missing. Raises ValueError where a file is in its place."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{path} cannot be a folder, a file is in its place; give another one") from error
    return path


def save_arrays(arrays: Mapping[str, Any], path: Path) -> None:
    """Compressed `.npz` of numbers; read it with `allow_pickle=False`."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)
