"""Does a training picture occur in an evaluation set: as the same file, or in another size or format?

Difference hashes decide the second: is each of 8 x 8 places of the picture, scaled down, brighter than its right
neighbor, and than the one below (128 bits). Scaling and recompression flip a few bits; pictures without structure
have no such hash.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agevlm.data.duplicates import hash64
from agevlm.data.tables import read_rows
from agevlm.images import SUFFIXES, open_image
from agevlm.progress import Bar


SIMILAR_BITS = 8  # of 128 that may differ
_FLAT = 4.0  # standard deviation, of 256 shades, below which a picture has no structure


def difference_hash(picture: Image.Image) -> tuple[int, int] | None:
    """Two 64-bit numbers, for the neighbors on the right and below; None for a picture without structure."""
    gray = np.asarray(picture.convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.float32)
    if gray.std() < _FLAT:
        return None
    right, below = gray[:8, 1:] > gray[:8, :-1], gray[1:, :8] > gray[:-1, :8]
    first, second = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, below))
    return first, second


@dataclass(frozen=True)
class EvaluationPictures:
    """Hashes of the pictures of evaluation sets: `files` {hash of the file: name}, `hashes` (pictures, 2) uint64."""

    files: dict[int, str]
    hashes: np.ndarray
    names: list[str]
    unreadable: int

    def find(self, data: bytes, picture: Image.Image) -> tuple[str, str] | None:
        """(kind, name) of an evaluation picture that is the same file, or similar."""
        name = self.files.get(hash64(data))
        if name is not None:
            return "evaluation_same", name
        found = difference_hash(picture) if len(self.hashes) else None
        if found is None:
            return None
        bits = np.bitwise_count(self.hashes ^ np.array(found, dtype=np.uint64)).sum(axis=1)
        best = int(bits.argmin())
        return ("evaluation_similar", self.names[best]) if bits[best] <= SIMILAR_BITS else None


def read_evaluation_pictures(folders: Iterable[str | Path], progress: bool = True) -> EvaluationPictures:
    """Hashes all pictures below folders: files, and the picture columns of Parquet files.

    Raises:
        ValueError: a folder that does not exist, or holds no picture.
    """
    files: dict[int, str] = {}
    hashes: list[tuple[int, int]] = []
    names: list[str] = []
    unreadable = 0
    for folder in map(Path, folders):
        before = len(files)
        for name, data in Bar(_pictures(folder), desc=f"pictures of {folder.name}", disable=not progress):
            files.setdefault(hash64(data), name)
            try:
                found = difference_hash(open_image(data, name))
            except ValueError:
                unreadable += 1
                continue
            if found is not None:
                hashes.append(found)
                names.append(name)
        if len(files) == before:
            raise ValueError(f"{folder} holds no pictures to compare with, neither files nor in Parquet")
    return EvaluationPictures(files, np.array(hashes, dtype=np.uint64).reshape(-1, 2), names, unreadable)


def _pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folders of the evaluation sets")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = f"{folder.name}/{path.relative_to(folder)}"
        if path.suffix.lower() in SUFFIXES:
            yield name, path.read_bytes()
        elif path.suffix.lower() == ".parquet":
            for number, row in enumerate(read_rows(path)):
                yield from ((f"{name} row {number}", data) for value in row.values() for data in _bytes(value))


def _bytes(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        yield value["bytes"]
    elif isinstance(value, list):
        for item in value:
            yield from _bytes(item)
