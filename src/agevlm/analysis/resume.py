"""Measurements of many pictures that survive an interruption, and a bad picture among them; files of an analysis.

Measurements are stored in `parts/` below the output, some pictures a file. The same call reads them again; they
are deleted when the results are written. A picture that cannot be measured is a row with the reason; with strict it
raises.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agevlm.images import stored_bytes
from agevlm.models import weights_digest
from agevlm.progress import Bar
from agevlm.store import claim, digest, replacing

from .pairs import Pair


Row = dict[str, np.ndarray]
ERROR = "error"  # the only key of a row that could not be measured: why
FORMAT = 2  # of `job.json`: parts of a run of another format are refused


def file_name(name: str) -> str:
    """`name` as a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def save_arrays(arrays: Mapping[str, Any], path: Path) -> None:
    """Compressed `.npz` of numbers; read it with `allow_pickle=False`."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)


class Parts:
    """The parts of one run below its output folder.

    Args:
        kind: name of the measurement. Model and pairs decide its results too; a folder with parts of another run is
            refused.

    Raises:
        ValueError: such a folder.
    """

    def __init__(self, output: str | Path, kind: str, model: torch.nn.Module, pairs: Sequence[Pair]):
        self.folder = Path(output) / "parts"
        job = {"format": FORMAT, "kind": kind, "model": weights_digest(model), "pairs": _pairs_digest(pairs)}
        claim(self.folder / "job.json", job)

    def keep(self, name: str, compute: Callable[[], list[Row]]) -> list[Row]:
        """The rows of part `name`: read if they are there, else computed and written."""
        path = self.folder / f"{name}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as arrays:
                rows: list[Row] = [{} for _ in range(int(arrays["rows"]))]
                for key in arrays.files:
                    index, _, field = key.partition("/")
                    if field:
                        rows[int(index)][field] = arrays[key]
            return rows
        rows = compute()
        named = {f"{index}/{field}": value for index, row in enumerate(rows) for field, value in row.items()}
        save_arrays({"rows": np.array(len(rows)), **named}, path)
        return rows

    def finish(self) -> None:
        """Deletes the parts: the results have been written."""
        for path in (*self.folder.glob("*.npz"), self.folder / "job.json"):
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def measure_parts(
    title: str,
    items: Sequence[Any],
    measure: Callable[[Sequence[Any]], list[Row]],
    *,
    size: int,
    unit: str,
    parts: Parts | None = None,
    progress: bool = True,
) -> list[Row]:
    """The rows of all items, `size` items at a time; with `parts` they are kept (`Parts.keep`)."""
    rows: list[Row] = []
    with Bar(total=len(items), desc=title, unit=unit, disable=not progress) as bar:
        for start in range(0, len(items), size):
            part = items[start : start + size]
            rows += measure(part) if parts is None else parts.keep(f"{title}-{start}", partial(measure, part))
            bar.update(len(part))
    return rows


def measured(measure: Callable[[Any], Row], item: Any, name: str, strict: bool) -> Row:
    """What `measure` returns of an item, or a row with `ERROR`; if strict, a ValueError that names the row."""
    try:
        return measure(item)
    except ValueError as error:
        if strict:
            raise ValueError(f"row {name}: {error}") from error
        return {ERROR: np.array(str(error))}


def failures(pairs: Sequence[Pair], rows: Iterable[Row]) -> list[dict[str, str]]:
    """Id and reason of every row that could not be measured."""
    return [{"id": pair.id, "reason": str(row[ERROR])} for pair, row in zip(pairs, rows, strict=True) if ERROR in row]


def _pairs_digest(pairs: Sequence[Pair]) -> str:
    def pieces(pair: Pair) -> Iterator[bytes | str]:
        yield from (pair.id, pair.text)
        for image in (pair.picture, pair.outline):
            yield "None" if image is None else stored_bytes(image)

    return digest(digest(piece) for pair in pairs for piece in pieces(pair))
