"""Files of an analysis, each written under a temporary name and renamed."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` once it has been written."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(arrays: Mapping[str, Any], path: Path) -> None:
    """Compressed `.npz` of numbers; read it with `allow_pickle=False`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def save_json(content: Any, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_image(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary)
