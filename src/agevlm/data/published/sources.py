"""The rows of a published data set, wherever they lie: a JSON or CSV file with pictures beside it, pictures with their
captions in text files, Parquet files, `datasets`.

A source knows its chunks, which processes read independently of each other, and hands out each record as what
`read_record` takes. `read_record` and `read_pictures` make it a row of ours, or say by name why not.
"""

import glob
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from PIL import Image

from agevlm.data.duplicates import hash64
from agevlm.data.rows import content_digest
from agevlm.data.tables import BELOW, IN_ROOT, load_table, read_csv, read_rows, split_files
from agevlm.images import SUFFIXES
from agevlm.store import digest, read_text

from .json_records import Chunk, check_shape, plan_chunks, read_records
from .pictures import PictureStore, decode_picture
from .records import BadRow, Draft


_JSON, _PARQUET, _CSV = (".json", ".jsonl"), (".parquet",), (".csv", ".tsv")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Row:
    """A draft with its pictures: `images` as {"bytes", "path"}, decoded in `pictures`; `notes` of both."""

    draft: Draft
    images: list[dict[str, Any]]
    pictures: list[Image.Image]
    notes: list[tuple[str, str]]


def draft_hashes(draft: Draft) -> tuple[int, int]:
    """Hashes of a row's id, and of its texts with its pictures' names."""
    names = [image if isinstance(image, str) else f"{hash64(image['bytes']):x}" for image in draft.images]
    return hash64(draft.id.encode()), hash64(json.dumps([names, draft.messages]).encode())


def read_pictures(draft: Draft, store: PictureStore) -> Row:
    """The draft with its pictures, every one found, read and decoded completely.

    Raises:
        BadRow: see `records.DROPPED`.
    """
    notes, pictures = list(draft.notes), []
    images: list[dict[str, Any]] = []
    try:
        for image in draft.images:
            if isinstance(image, str):
                data, note = store.read(image)
                image = {"bytes": data, "path": image}
                notes += [note] if note else []
            picture, remarks = decode_picture(image["bytes"], image["path"] or f"picture {len(images) + 1}")
            notes += remarks
            images.append(image)
            pictures.append(picture)
    except BadRow as error:
        error.row_id, error.source = draft.id, draft.source
        raise
    return Row(draft, images, pictures, notes)


class Source(ABC):
    """The rows of a data set that is called `name`.

    Args:
        store: where the pictures lie that rows name.
        paths: the files of the rows.
        size: of all rows, in bytes or rows. Default: of the files.
    """

    def __init__(self, name: str, store: PictureStore, paths: Sequence[Path], size: int | None = None):
        self.name, self.store, self.paths = name, store, list(paths)
        self.size = sum(path.stat().st_size for path in paths) if size is None else size

    def digest(self) -> str:
        """Of the rows, and of pictures that they hold, as they are stored."""

        def pieces() -> Iterator[bytes]:
            for path in self.paths:
                with path.open("rb") as file:
                    while block := file.read(2**22):
                        yield block

        return digest(pieces())

    def chunks(self, size: int, limit: int | None) -> list[Chunk]:
        """The first `limit` rows in chunks of about `size`."""
        total = self.size if limit is None else min(limit, self.size)
        return [Chunk(i, start, min(size, total - start), start) for i, start in enumerate(range(0, total, size))]

    @abstractmethod
    def records(self, chunk: Chunk) -> Iterator[tuple[int, bytes | Mapping[str, Any] | None]]:
        """(place from 1, record) of the rows of a chunk."""


class JsonSource(Source):
    """A JSONL file, or a JSON array."""

    def __init__(self, path: Path, store: PictureStore):
        check_shape(path)
        super().__init__(path.name, store, [path])

    def chunks(self, size: int, limit: int | None) -> list[Chunk]:
        return plan_chunks(self.paths[0], size, limit)

    def records(self, chunk: Chunk) -> Iterator[tuple[int, bytes | None]]:
        return enumerate((record for _, record in read_records(self.paths[0], chunk)), start=chunk.first + 1)


class ListSource(Source):
    """Records in memory, such as the lines of a CSV file."""

    def __init__(self, name: str, store: PictureStore, paths: Sequence[Path], rows: Sequence[Mapping[str, Any]]):
        super().__init__(name, store, paths, len(rows))
        self.rows = rows

    def digest(self) -> str:
        return digest(json.dumps(self.rows))

    def records(self, chunk: Chunk) -> Iterator[tuple[int, Mapping[str, Any]]]:
        return enumerate(self.rows[chunk.first : chunk.first + chunk.count], start=chunk.first + 1)


class ParquetSource(Source):
    """Parquet files with the columns id, images and messages (or others that `read_record` knows)."""

    def chunks(self, size: int, limit: int | None) -> list[Chunk]:
        """A chunk for each file; `offset` is the file's number."""
        chunks: list[Chunk] = []
        first = 0
        for number, path in enumerate(self.paths):
            count = pq.read_metadata(path).num_rows
            count = count if limit is None else min(count, limit - first)
            if count > 0:
                chunks.append(Chunk(len(chunks), first, count, number))
            first += count
        return chunks

    def records(self, chunk: Chunk) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(islice(read_rows(self.paths[chunk.offset]), chunk.count), start=chunk.first + 1)


class DatasetSource(Source):
    """A data set of the Hub, or one that `save_to_disk` wrote: memory-mapped, pictures not decoded."""

    def __init__(self, name: str, store: PictureStore, dataset: Dataset):
        super().__init__(name, store, [], len(dataset))
        self.dataset = dataset.with_format("arrow")

    def digest(self) -> str:
        return content_digest(self.dataset, self.dataset.column_names)

    def records(self, chunk: Chunk) -> Iterator[tuple[int, dict[str, Any]]]:
        for start in range(chunk.first, chunk.first + chunk.count, 16):
            stop = min(start + 16, chunk.first + chunk.count)
            for number, record in enumerate(self.dataset[start:stop].to_pylist()):
                yield start + number + 1, record


def open_source(name: str | Path, roots: Sequence[str | Path] | None, work: str | Path) -> Source:
    """The source that `name` stands for.

    Args:
        name: a .json, .jsonl or .csv file; a folder with a JSON file (also in its folder `jsons`, as Cambrian has it);
            pictures with metadata.csv or metadata.jsonl, or each with its caption in a .txt file of its name; Parquet
            files in a folder; a folder of `save_to_disk`; the id of a data set of the Hub.
        roots: folders and archives of the pictures. Default: the folder of the file, and where that is called `jsons`
            the one above it.
        work: folder for an index of pictures, if one is needed.

    Raises:
        ValueError: nothing there, or several things.
    """
    path = Path(name)
    if path.is_file() and path.suffix.lower() in _JSON:
        if roots is None:
            roots = [path.absolute().parent.parent if path.absolute().parent.name == "jsons" else path.parent]
        return JsonSource(path, PictureStore(roots, work))
    if path.is_file():
        if path.suffix.lower() in _PARQUET:
            return ParquetSource(path.name, PictureStore(roots or [path.parent], work), [path])
        if path.suffix.lower() in _CSV:
            return ListSource(path.name, PictureStore(roots or [path.parent], work), [path], read_csv(path))
        raise ValueError(f"{path} is neither .json, .jsonl, .csv nor .parquet; rename it if it is one of them")
    if path.is_dir():
        return _open_folder(path, roots, work)
    if not HUB_ID.fullmatch(str(name)):
        raise ValueError(f"{name} does not exist; give a file, a folder, or the id of a data set of the Hub")
    return DatasetSource(path.name, PictureStore(roots or [], work), load_table(str(name), "train"))


def _open_folder(path: Path, roots: Sequence[str | Path] | None, work: str | Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        path = path / "train"
    store = PictureStore(roots or [path], work)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return DatasetSource(path.name, store, load_table(str(path)))
    if parquet := split_files(path, _PARQUET, IN_ROOT):
        return ParquetSource(path.name, store, parquet)
    parts = [part for part in (path / "captions", path / "instructions") if any(part.glob("*.parquet"))]
    if parts:
        raise ValueError(f"{path} has a folder for each part of its rows; name one: {' or '.join(map(str, parts))}")
    told = next((file for end in (".jsonl", ".csv") if (file := path / f"metadata{end}").is_file()), None)
    if told is not None:
        return open_source(told, roots, work)
    found = split_files(path, _JSON, ("*", "jsons/*"))
    if not found and (parquet := split_files(path, _PARQUET, BELOW)):
        return ParquetSource(path.name, store, parquet)
    if len(found) != 1 and (captioned := _captioned(path)):
        return ListSource(path.name, store, [path / row["image"] for row in captioned], captioned)
    if len(found) != 1:
        names = ", ".join(p.name for p in found[:20]) or "none"
        raise ValueError(f"{path} must hold one .json or .jsonl file, or Parquet files; found {names}. Pass the file.")
    return open_source(found[0], roots, work)


def _captioned(folder: Path) -> list[dict[str, str]]:
    """The pictures below a folder that have a caption in NAME.txt beside NAME.jpg, as rows."""
    rows = []
    for text in sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".txt"):
        for picture in sorted(text.parent.glob(f"{glob.escape(text.stem)}.*")):
            if picture.suffix.lower() in SUFFIXES:
                name = picture.relative_to(folder).as_posix()
                caption = read_text(text, errors="surrogateescape")
                rows.append({"id": name, "image": name, "caption": caption.strip()})
    return rows
