"""Lets training take a data set as it was published: converts it once into the cache of `datasets`, by one process.

`--data` may name a .json or .jsonl file (pictures beside it), a folder of `save_to_disk`, Parquet files, or a set of
the Hub, with `conversations`, or with `messages` and `images`. It is converted as `agevlm data cambrian` does it, on
one core; that verb uses all of them, takes other folders of pictures, and its result lies where masks can join it.
"""

from pathlib import Path

import datasets
from filelock import FileLock
from tqdm import tqdm

from agevlm.store import digest, read_json

from .convert import FORMAT, check_whole, convert
from .sources import DatasetSource, Source, open_source


def prepare(data: str | Path, part: str, guided: bool = False) -> str:
    """The folder that holds `part` of a data set in shards of our rows.

    Args:
        data: such a folder already (returned as it is), a URL (likewise), or what `published.open_source` takes.
        part: `captions` or `instructions`.
        guided: the rows must bring masks, for which published data sets have no place.

    Raises:
        ValueError: nothing to train on, no place for masks, or the other part, is there; see `open_source`, `convert`.
    """
    folder = Path(data)
    if "://" in str(data) or (folder / part).is_dir():
        return str(data)
    if (folder / "summary.json").is_file():
        raise ValueError(f"{data} is one part of a data set: name the folder {part} and give the one above it")
    if (folder / "captions").is_dir() or (folder / "instructions").is_dir():
        raise ValueError(
            f"{data} has no folder {part}, which this stage reads: `agevlm data import SOURCE --part {part} --output "
            "DATA` makes one of your rows"
        )
    if guided:
        raise ValueError(
            f"this stage is guided by masks, and {data} has no place for them: `agevlm data import {data} --masks "
            "MASKS --output DATA` makes a data set with masks for --data; to train without: --variant ca-baseline"
        )
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "agevlm"
    cache.mkdir(parents=True, exist_ok=True)
    source = open_source(data, None, cache)
    target = cache / _identity(source) / part
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # the other processes wait and find it done
        is_new = not target.exists()
        summary = convert(source, target) if is_new else check_whole(target, read_json(target / "summary.json"))
    if is_new:
        dropped = ", ".join(f"{kind} {count:,}" for kind, count in summary["dropped"].items()) or "none"
        tqdm.write(f"{data}: {summary['rows']:,} rows to train on; dropped: {dropped}. List: {target}/bad_rows.jsonl")
    return str(target.parent)


def _identity(source: Source) -> str:
    """Changes with the data set's content, as far as its files' names, sizes and times tell."""
    facts = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in source.paths]
    if isinstance(source, DatasetSource):
        facts = [source.name, source.dataset._fingerprint]
    return digest("\n".join([f"format {FORMAT}", *facts]), size=8)
