"""Opens a table of rows or masks: a Parquet file, a folder of them or of `save_to_disk`, or a set of the Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, load_dataset, load_from_disk


def find_files(pattern: str) -> list[str]:
    """Files that fit a pattern with `*`, a path or an fsspec URL (`hf://datasets/...`), sorted."""
    filesystem, path = fsspec.core.url_to_fs(pattern)
    return [filesystem.unstrip_protocol(name) if "://" in pattern else name for name in sorted(filesystem.glob(path))]


def load_table(
    name: str,
    split: str | None = None,
    revision: str | None = None,
    usual: Sequence[str] = ("train",),
    config: str | None = None,
) -> Dataset:
    """A data set, memory-mapped, its pictures left undecoded.

    Args:
        name: Parquet file, folder with Parquet files or of `save_to_disk`, or repository.
        split: of a repository, or of a folder with a card. Default: the first of `usual` that is there, or the only
            one.
        config: of a repository that has several.

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
            found = load_dataset(name, config, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name} is neither a file or folder of rows nor a data set of the Hub: {error}") from error
    if not isinstance(found, Dataset):
        names = [*(name for name in usual if name in found), *(found if len(found) == 1 else usual)]
        chosen = split or names[0]
        if chosen not in found:
            raise ValueError(f"{name} has no split {chosen!r}; use one of {', '.join(found)}")
        found = found[chosen]
    return found.with_format(None)
