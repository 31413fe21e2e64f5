"""The rows a run grounds: finding the data set, the share to attempt, decoding ahead of the models.

A data set is a Parquet file, a folder of them, a folder of `save_to_disk`, or a repository of the Hub. Its rows are
the project's (`data/rows.py`: id, images, messages); the first picture of a row is grounded.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset, load_from_disk
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from agevlm.data.masks import subset_hash
from agevlm.images import open_header, open_image

from .queries import Query, make_query
from .regions import BAD_PICTURE, BAD_ROW, NO_PICTURE, NO_QUERY


def load_table(name: str, split: str | None = None, revision: str | None = None) -> Dataset:
    """A data set, memory-mapped, its pictures left undecoded.

    Args:
        name: Parquet file, folder with Parquet files or of `save_to_disk`, or repository.
        split: of a repository, or of a folder with a card (default: `train`, or the only one).

    Raises:
        ValueError: there is none of that name, or it has several splits.
    """
    path = Path(name)
    try:
        if path.is_file():
            found: Any = load_dataset("parquet", data_files={"train": str(path)})
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = load_from_disk(name)
        elif path.is_dir() and not (path / "README.md").is_file():
            files = sorted(str(file) for file in path.glob("*.parquet"))
            if not files:
                raise ValueError(f"{name} has no Parquet files in it; pass a file, or a folder that holds them")
            found = load_dataset("parquet", data_files={"train": files})
        else:
            found = load_dataset(name, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name} is neither a file or folder of rows nor a data set of the Hub: {error}") from error
    if not isinstance(found, Dataset):
        chosen = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if chosen not in found:
            raise ValueError(f"{name} has no split {chosen!r}; use one of {', '.join(found)}")
        found = found[chosen]
    return found.with_format(None)


class Undecoded(Sequence[dict[str, Any]]):
    """Rows of a data set with their pictures as {bytes, path}, decoded by nobody.

    Args:
        columns: the ones to read (default: all).
    """

    def __init__(self, data: Dataset, columns: list[str] | None = None):
        self.data = (data.select_columns(columns) if columns else data).with_format("arrow")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        return self.data[index : index + 1].to_pylist()[0]


def choose_rows(ids: Sequence[str], attempt: int | None, seed: int) -> np.ndarray:
    """The places of the rows to attempt, in order: all, or `attempt` of them by a hash of their ids and `seed`."""
    if attempt is None or attempt >= len(ids):
        return np.arange(len(ids))
    return np.sort(heapq.nsmallest(attempt, range(len(ids)), key=lambda place: subset_hash(ids[place], seed)))


@dataclass
class Item:
    """One row on its way to a backend. `outcome` is a failure where there is no picture or no query."""

    index: int
    id: str
    image: Image.Image | None = None
    query: Query | None = None
    outcome: str = ""
    detail: str = ""


class Items(TorchDataset):
    """Rows as `Item`s; what is wrong with one is told in it, not raised.

    Args:
        data: rows with id, images and messages.
        places: the rows to go through.
        query_source: see `queries.py`.
        decode: False opens pictures for their size alone.
    """

    def __init__(self, data: Dataset, places: np.ndarray, query_source: str, decode: bool = True):
        missing = [name for name in ("id", "images", "messages") if name not in data.column_names]
        if missing:
            raise ValueError(
                f"the data set lacks the column {', '.join(missing)}; it has {', '.join(data.column_names)}. Rows are "
                "described in data/rows.py"
            )
        self.data = Undecoded(data, ["id", "images", "messages"])
        self.places, self.query_source, self.decode = places, query_source, decode

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Item:
        index = int(self.places[number])
        row: Mapping[str, Any] = self.data[index]
        item = Item(index, row["id"])
        if not row["images"]:
            item.outcome = NO_PICTURE
            return item
        try:
            item.query = make_query(row["messages"] or [], self.query_source)
        except (KeyError, TypeError, AttributeError) as error:
            item.outcome, item.detail = BAD_ROW, f"messages cannot be read: {error!r}"
            return item
        if item.query is None:
            item.outcome = NO_QUERY
            return item
        try:
            item.image = (open_image if self.decode else open_header)(row["images"][0], f"row {item.id!r}")
        except ValueError as error:
            item.outcome, item.detail = BAD_PICTURE, str(error)
        return item
