"""Measurements of many pictures that survive an interruption, and a bad picture among them.

What has been measured lies in `parts/` below the output, some pictures a file, and is read from there when the same
run is started again; it is deleted when the results are written. A picture that cannot be measured is a row of its own
with the reason, unless strict.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from agevlm.store import claim

from .files import make_folder, save_arrays
from .pairs import Pair


Row = dict[str, np.ndarray]
Keep = Callable[[str, Callable[[], list[Row]]], list[Row]]
ERROR = "error"  # the only key of a row that could not be measured: why
SAMPLED = 256  # values of a parameter that go into a model's digest


def without_keeping(_: str, compute: Callable[[], list[Row]]) -> list[Row]:
    """A `Keep` that keeps nothing."""
    return compute()


class Parts:
    """The parts of one run below its output folder.

    Args:
        job: what decides the results; a folder with parts of another job is refused.

    Raises:
        ValueError: such a folder.
    """

    def __init__(self, output: str | Path, job: Mapping[str, Any]):
        self.folder = make_folder(Path(output) / "parts")
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


def measured(compute: Callable[[], Row], name: str, strict: bool) -> Row:
    """What `compute` returns, or a row with `ERROR`. If strict, raises ValueError naming the row instead."""
    try:
        return compute()
    except ValueError as error:
        if strict:
            raise ValueError(f"row {name}: {error}") from error
        return {ERROR: np.array(str(error))}


def failures(pairs: Sequence[Pair], rows: Iterable[Row]) -> list[dict[str, str]]:
    """Id and reason of every row that could not be measured."""
    return [{"id": pair.id, "reason": str(row[ERROR])} for pair, row in zip(pairs, rows, strict=True) if ERROR in row]


def job_of(kind: str, model: torch.nn.Module, pairs: Sequence[Pair], **more: Any) -> dict[str, Any]:
    """What decides the results of a measurement, small enough for a file."""
    return {"kind": kind, "model": _model_digest(model), "pairs": _pairs_digest(pairs), **more}


def _model_digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        values = parameter.detach().flatten()
        sampled = values[:: max(1, values.numel() // SAMPLED)].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sampled.numpy().tobytes())
    return digest.hexdigest()


def _pairs_digest(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for source in (pair.id, pair.text, pair.picture, pair.outline):
            if isinstance(source, Image.Image):
                source = repr((source.mode, source.size)).encode() + source.tobytes()
            digest.update(hashlib.sha256(source if isinstance(source, bytes) else str(source).encode()).digest())
    return digest.hexdigest()
