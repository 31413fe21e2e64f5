"""Opens a table of rows or masks: a Parquet file, a folder of them or of `save_to_disk`, or a set of the Hub."""

import csv
import glob
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset, load_from_disk
from datasets.data_files import (
    NON_WORDS_CHARS,
    SPLIT_KEYWORDS,
    get_data_patterns,
    resolve_pattern,
    sanitize_patterns,
)
from huggingface_hub import DatasetCard

from agevlm.store import check_text

from .rows import refuse_names


IN_ROOT, BELOW = ("data/*", "*"), ("data/*/*", "*/*", "*/*/*")  # where a folder's files are looked for, in turn
_LONGEST_FIELD = 64_000_000  # of a CSV file: a picture in base64
_GROUP_ROWS, _GROUP_BYTES = 100, 32 * 2**20  # of a Parquet row group: what a reader holds at once
_SPLIT = {
    str(split): re.compile(rf"(?:^|[{NON_WORDS_CHARS}/])(?:{'|'.join(words)})(?:[{NON_WORDS_CHARS}/]|$)")
    for split, words in SPLIT_KEYWORDS.items()
}


def exactly(path: str | Path) -> str:
    """A path or fsspec URL as the pattern that fits it alone: `datasets` and fsspec read `[1]` as a set of letters."""
    return glob.escape(str(path) if "://" in str(path) else os.path.abspath(path))


def find_files(folder: str | Path, pattern: str) -> list[str]:
    """Files in a folder or fsspec URL (`hf://datasets/...`) that fit a pattern with `*`, sorted."""
    filesystem, path = fsspec.core.url_to_fs(f"{exactly(folder)}/{pattern}")
    found = sorted(filesystem.glob(path))
    return [filesystem.unstrip_protocol(name) for name in found] if "://" in str(folder) else found


def read_files(paths: Sequence[str | Path], **options: Any) -> Dataset:
    """The rows of Parquet, or of `.json` and `.jsonl` files; `options` of `Dataset.from_parquet` or `from_json`.

    Parquet brings the bytes of its pictures: names are refused.
    """
    files = [exactly(path) for path in paths]
    if Path(paths[0]).suffix in (".json", ".jsonl"):
        for path in filter(os.path.isfile, paths):
            check_text(Path(path))
        return Dataset.from_json(files, **options)
    return refuse_names(Dataset.from_parquet(files, **options))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a few at a time; pictures as {bytes, path}."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16):
            yield from batch.to_pylist()


class GroupWriter(pq.ParquetWriter):
    """Writes a Parquet file row by row, in groups of 100 rows, or fewer where their pictures are large."""

    def __init__(self, path: Path, schema: pa.Schema):
        super().__init__(path, schema, use_dictionary=False)
        self.rows, self.bytes = list[Any](), 0

    def add(self, row: Mapping[str, Any], size: int = 0) -> None:
        """A row, with pictures of `size` bytes."""
        self.rows.append(row)
        self.bytes += size
        if len(self.rows) == _GROUP_ROWS or self.bytes >= _GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        rows, self.rows, self.bytes = self.rows, [], 0
        if rows:
            self.write_table(pa.Table.from_pylist(rows, schema=self.schema))

    def close(self) -> None:
        self._write()
        super().close()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The lines of a CSV file with a header, fields apart by commas, semicolons or tabs, as texts by column. What a
    line has beyond the header's columns is a list under None; bytes that are no UTF-8 are lone surrogates.

    Raises:
        ValueError: it is no such file.
    """
    check_text(path)
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            file.seek(0)
            separator = max(",;\t", key=header.count)
            return list(csv.DictReader(file, delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def split_files(
    folder: Path, suffixes: Sequence[str], places: Sequence[str] = (*IN_ROOT, *BELOW), split: str | None = None
) -> list[Path]:
    """The files of one split, told by the names of files and folders as `datasets` tells them; empty without files.

    Files that name no split are one. What is used and what is not is printed where a folder has several.

    Args:
        places: patterns; the first that fits decides.
        split: default: `train`, or the only one.

    Raises:
        ValueError: no such split, or several configurations.
    """
    found = (sorted(path for path in folder.glob(place) if path.suffix.lower() in suffixes and path.is_file())
             for place in places)  # fmt: skip
    splits: dict[str, list[str]] = {}
    for path in next(filter(None, found), []):
        name = path.relative_to(folder).as_posix()
        splits.setdefault(next((kind for kind, word in _SPLIT.items() if word.search(name)), "none"), []).append(name)
    if not splits:
        return []
    chosen = split or ("train" if len(splits) > 1 else next(iter(splits)))
    listed = "; ".join(f"{kind}: {', '.join(names)[:200]}" for kind, names in splits.items())
    if chosen not in splits:
        raise ValueError(f"{folder} has no split {chosen!r}, but {listed}; pass the file")
    folders = {part for name in splits[chosen] for part in name.split("/")[:-1]}
    configurations = sorted(part for part in folders if not any(word.search(part) for word in _SPLIT.values()))
    if len(configurations) > 1:
        raise ValueError(f"{folder} has several configurations ({', '.join(configurations)}); pass the folder of one")
    if len(splits) > 1:
        print(f"{folder}: the split {chosen} is used, of {listed}", file=sys.stderr)
    return [folder / name for name in splits[chosen]]


def load_table(
    name: str, split: str | None = None, usual: Sequence[str] = ("train",), config: str | None = None
) -> Dataset:
    """A data set, memory-mapped, its pictures left undecoded.

    Args:
        name: Parquet file, folder with Parquet files or of `save_to_disk`, or repository.
        split: of a repository or a folder. Default: the first of `usual` that is there, or the only one.
        config: of a repository that has several.

    Raises:
        ValueError: there is none of that name, or it has several splits.
    """
    path = Path(name)
    try:
        if path.is_file():
            found: Any = {"train": read_files([path])}
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = load_from_disk(name)
        elif path.is_dir() and not (path / "README.md").is_file():
            there = split_files(path, [".parquet"], split=split)
            if not there:
                raise ValueError(f"{name} has no Parquet files in it; pass a file, or a folder that holds them")
            found = {split or "train": read_files(there)}
        else:
            found = load_set(name, config)
    except OSError as error:  # whatever the disk, the network or the Hub says
        raise ValueError(f"{name} is neither a file or folder of rows nor a data set of the Hub: {error}") from error
    if not isinstance(found, Dataset):
        names = [*(name for name in usual if name in found), *(found if len(found) == 1 else usual)]
        chosen = split or names[0]
        if chosen not in found:
            raise ValueError(f"{name} has no split {chosen!r}; use one of {', '.join(found)}")
        found = found[chosen]
    # What `datasets` itself has found in a folder of pictures is named by it, not by a file from elsewhere
    found = refuse_names(found) if found.info.builder_name == "parquet" else found
    return found.with_format(None)


def check_columns(what: object, there: Collection[str], wanted: Iterable[str]) -> None:
    """Raises a ValueError that names `what`, such as a file, unless all `wanted` columns are `there`."""
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(f"{what}: no column {', '.join(missing)}, which is needed; there are {', '.join(there)}")


def load_set(name: str | Path, config: str | None, split: str | None = None) -> Any:
    """`load_dataset` of a set of the Hub, or of a snapshot of one in a folder, whose own name `datasets` would take
    for a part of the patterns."""
    files = _files(Path(name), config) if Path(name).is_dir() else {}
    if files:
        return load_dataset("parquet", data_files=files, split=split)
    return load_dataset(str(name), config, split=split)


def _files(folder: Path, config: str | None) -> dict[str, list[str]]:
    """Split -> its Parquet files as patterns, as the folder's card tells them for `config` or for the one there is, or
    as `datasets` tells them by their names; nothing where that is not clear, or other files are among them."""
    place, card = exactly(folder), folder / "README.md"
    told = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
    listed = told.get("configs") or []
    named = [entry for entry in listed if "data_files" in entry and config in (None, entry.get("config_name"))]
    patterns: dict[Any, list[str]] = {}
    if not listed:
        with suppress(FileNotFoundError):  # it has none
            patterns = get_data_patterns(place)
    elif len(named) == 1:
        patterns = sanitize_patterns(named[0]["data_files"])
    files = {
        str(split): [name for pattern in given for name in resolve_pattern(pattern, place)]
        for split, given in patterns.items()
    }
    if not all(name.endswith(".parquet") for names in files.values() for name in names):
        return {}
    return {split: [exactly(name) for name in names] for split, names in files.items()}
