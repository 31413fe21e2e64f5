"""Where rows come from: the Hub through `datasets`, or a file or folder in the published columns.

A folder holds `<benchmark>.parquet`, `.json`, `.jsonl` or `.tsv`, or the files as they are published
(`HallusionBench.json`, `OCRBench.json`, `coco_pope_<category>.json`), or VLMEvalKit's (`POPE.tsv`, `CV-Bench-2D.tsv`),
or it is a snapshot of the data set's repository, which is read as `load_dataset` reads it. Pictures are in the rows,
or in the folder (or another one) under the path that the row names, or in a TSV as base64. Columns that go by other
names in the published files are renamed, and rows without an `id` get one from what numbers them there.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.csv
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Image as ImageFeature
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from agevlm.data.published.records import BadRow, read_image
from agevlm.data.rows import refuse_names, resolve_inside, undecoded
from agevlm.data.tables import load_set, read_files
from agevlm.store import check_text, read_text

from .benchmark import Benchmark, check_fields, check_row
from .inputs import without_pictures


MOST_CHARACTERS = 64_000_000  # of a base64 picture: its size in pixels is limited where it is decoded
SUFFIXES = ("parquet", "json", "jsonl", "tsv")
LISTS = ("choices", "answer")  # in a TSV as JSON, or as Python prints them
_SHARD = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.")
PATHS = ("image", "image_path", "filename")


def load_hub(benchmark: Benchmark, path: str | None = None) -> Dataset:
    """Rows of the published data set (`path`: of another one in the same columns).

    Raises:
        ValueError: there is none, or a column is missing.
    """
    source = benchmark.source
    place = path or source.hub
    if not place:
        raise ValueError(f"{benchmark.name} has no published set; use --scenes DIR or --data {benchmark.name}=FILE")
    if not Path(place).is_dir():
        _check_reachable(place)
    parts = [load_set(place, source.config, split) for split in source.splits]
    parts = [refuse_names(part) if part.info.builder_name == "parquet" else part for part in parts]
    return prepare(benchmark, concatenate_datasets(parts), place)


def _check_reachable(place: str) -> None:
    """Raises ValueError at once where the Hub is out of reach: `datasets` would try for most of a minute."""
    try:
        if try_to_load_from_cache(place, "README.md", repo_type="dataset") is None:
            HfApi().dataset_info(place, timeout=10)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return  # `datasets` says what is wrong with this set, or finds it on the disk
    except Exception as error:
        raise ValueError(
            f"{place} cannot be fetched: the Hub is out of reach ({type(error).__name__}). Connect, or give rows of "
            "this machine: --data FILE of own questions, --data FOLDER of published ones, --scenes or --masks"
        ) from error


def load_local(benchmark: Benchmark, place: str | Path, images: str | Path | None = None) -> Dataset:
    """Rows of a file, or of the one file (or published set of files) for this benchmark in a folder.

    Args:
        images: folder of the pictures that rows name; default: the file's.

    Raises:
        ValueError: nothing or several things to load, a part of a set, a file that cannot be read, a missing column, a
            path that leaves the folder, a row without its right answer, or rows that share an id.
    """
    place = Path(place)
    if place.is_file():
        if _SHARD.search(place.name):
            raise ValueError(f"{place} is a part of a set; give the folder that holds all parts")
        paths = [place]
    else:
        source = benchmark.source
        own = [path for suffix in SUFFIXES if (path := place / f"{benchmark.name}.{suffix}").is_file()]
        published = [path for name in source.files if (path := place / name).is_file()]
        tables = [path for name in source.tables if (path := place / name).is_file()]
        paths = own or published or tables
        if not paths and any(place.rglob("*.parquet")):
            return load_hub(benchmark, str(place))
        if not paths or len(own) > 1:
            wanted = ", ".join([f"{benchmark.name}.{suffix}" for suffix in SUFFIXES])
            raise ValueError(
                f"{place} has {len(own)} files for {benchmark.name}; put one of {wanted} there, or "
                f"{', '.join((*source.files, *source.tables))}, or a snapshot of {source.hub}"
            )
    parts = [prepare(benchmark, _read(path, benchmark, images), str(path)) for path in paths]
    return concatenate_datasets(parts)


def prepare(benchmark: Benchmark, rows: Dataset, where: str) -> Dataset:
    """Published columns under one set of names, an `id` per row, pictures left undecoded, the rows that the protocol
    uses."""
    for old, new in benchmark.source.renamed.items():
        if new not in rows.column_names and old in rows.column_names:
            rows = rows.rename_column(old, new)
    ids = rows.features.get("id")
    if not isinstance(ids, Value) or ids.dtype != "string" or len(set(rows["id"])) != len(rows):
        rows = rows if ids is None else rows.remove_columns("id")  # OCRBench numbers each source apart
        rows = _with_ids(benchmark, rows, where)
    check_fields(benchmark, rows.column_names, where)
    rows = undecoded(rows)
    used = []
    for index, row in enumerate(without_pictures(rows)):
        if benchmark.uses(row):
            check_row(benchmark, row, where)
            used.append(index)
    return rows if len(used) == len(rows) else rows.select(used)


def _with_ids(benchmark: Benchmark, rows: Dataset, where: str) -> Dataset:
    number = benchmark.source.number
    try:
        ids = [
            "-".join(map(str, number(row))) if number is not None else f"{index:06d}"
            for index, row in enumerate(without_pictures(rows))
        ]
    except KeyError as error:
        raise ValueError(
            f"{where}: {benchmark.name} lacks the column {error.args[0]}, which numbers its rows; it has "
            f"{', '.join(rows.column_names)}. Rename or add it."
        ) from error
    if len(set(ids)) != len(ids):
        # the public HallusionBench has no such rows, VLMEvalKit's merged POPE may
        ids = [f"{name}-{index:06d}" for index, name in enumerate(ids)]
    return rows.add_column("id", ids)


def _read(path: Path, benchmark: Benchmark, images: str | Path | None) -> Dataset:
    try:
        if path.suffix == ".parquet":
            return read_files([path], keep_in_memory=True)
        rows = _read_tsv(path, benchmark) if path.suffix == ".tsv" else _read_json(path)
        if not rows:
            raise ValueError("it holds no rows")
        if path.name in benchmark.source.files:
            rows = [{**benchmark.source.from_name(path.stem), **row} for row in rows]
        root = Path(path.parent if images is None else images)
        rows = [_with_picture(row, root, f"row {index}") for index, row in enumerate(rows)]
        features = dict(Dataset.from_list([{k: v for k, v in row.items() if k != "image"} for row in rows]).features)
        return Dataset.from_list(rows, features=Features({**features, "image": ImageFeature(decode=False)}))
    except (ValueError, TypeError, OSError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    lines = [line for line in text.split("\n") if line.strip()]  # a text may hold other signs that end a line
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    if not all(isinstance(row, dict) and row for row in rows):
        raise ValueError("expected a list of objects with fields, or one per line")
    for index, row in enumerate(rows):
        for name, value in row.items():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"row {index}, field {name}: {value} is too large; write it as a text")
    # a gold answer is a text in some rows and a list in others
    listed = {key for row in rows for key, value in row.items() if isinstance(value, list)}
    return [
        {k: [v] if k in listed and not isinstance(v, list) and v is not None else v for k, v in row.items()}
        for row in rows
    ]


def _read_tsv(path: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Rows of a table, VLMEvalKit's (with an `index`) in the published columns."""
    options = pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True)
    block = pyarrow.csv.ReadOptions(block_size=min(2**31 - 1, max(1 << 20, path.stat().st_size + 1)))
    check_text(path)
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\r\n").split("\t")
    text = pyarrow.csv.ConvertOptions(column_types={name.strip('"'): "string" for name in header})
    rows = pyarrow.csv.read_csv(path, block, options, text).to_pylist()
    rows = [
        {name: listed(value) if name in LISTS and value[:1] == "[" else value for name, value in row.items()}
        for row in rows
    ]
    if not rows or "index" not in rows[0] or "id" in rows[0]:
        return rows
    pictures = {row["index"]: row.get("image") for row in rows}
    rows = [{**row, "id": row["index"]} for row in rows]
    for row in rows:
        if row.get("image") in pictures:  # the number of the row that has the same picture
            row["image"] = pictures[row["image"]]
    try:
        return [dict(benchmark.source.from_table(row)) for row in rows]
    except KeyError as error:
        raise ValueError(
            f"it has an index, as VLMEvalKit's files, but lacks the column {error.args[0]}; it has "
            f"{', '.join(rows[0])}. Rename or add it, or rename index to id and give the published columns."
        ) from error


def listed(text: str) -> Any:
    """The list that a text holds as JSON, or as Python prints it. Raises ValueError if it holds none."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text)
        except (SyntaxError, MemoryError) as error:
            raise ValueError(f"{text[:80]!r} is no list") from error


def _with_picture(row: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
    """The row with `image` as {"bytes", "path"}, or null where it names none."""
    named = next((row[name] for name in PATHS if row.get(name)), None)
    if named is None:
        return {**row, "image": None}
    if not isinstance(named, str):
        raise ValueError(f"{where}, field image: expected a path or base64, got {type(named).__name__}")
    if len(named) > MOST_CHARACTERS:
        raise ValueError(f"{where}, field image: {len(named)} characters of base64; shrink the picture")
    try:
        image = read_image(named, "it")
        if isinstance(image, str):
            image = {"bytes": None, "path": str(resolve_inside(root, image))}
    except (BadRow, ValueError) as error:
        raise ValueError(f"{where}, field image: {error}") from error
    return {**row, "image": image}
