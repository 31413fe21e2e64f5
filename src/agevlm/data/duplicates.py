"""Finds equal things among millions in flat memory: 64-bit hashes on disk, compared one part of their range at a time.

Two of ten million different things share a hash with a probability of 3 in a million.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from agevlm.store import digest, replacing


_PARTS = 16


def hash64(data: bytes) -> int:
    """The first 8 bytes of blake2b."""
    return int(digest(data, size=8), 16)


def save_hashes(path: Path, rows: Sequence[Sequence[int]] | np.ndarray) -> None:
    """Writes rows of whole numbers, the first of which is the hash to compare, as (rows, numbers) uint64."""
    with replacing(path) as temporary:
        np.save(temporary, np.array(rows, dtype=np.uint64), allow_pickle=False)


def equal_groups(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Groups of at least two rows of the files with the same hash, (rows, numbers) uint64, in the files' order."""
    for part in range(_PARTS):
        found = [array[array[:, 0] >> np.uint64(60) == part] for array in map(_load, paths) if array.size]
        if not found:
            continue
        rows = np.concatenate(found)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        _, starts, counts = np.unique(rows[:, 0], return_index=True, return_counts=True)
        for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
            yield rows[start : start + count]


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
