"""Joins a data set of guidance masks to a data set of rows by id, for all rows or for a stable share of them.

A share is decided by a hash of the row's id: it needs no list, holds for any order of the rows, and larger shares
contain smaller ones.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, concatenate_datasets

from agevlm.store import digest

from .duplicates import hash64
from .rows import GUIDANCE, MASK_FEATURES
from .tables import find_files, load_table, read_files


KEPT = "kept"  # the split of `agevlm ground` that holds its good masks


def subset_hash(row_id: str, seed: int = 0) -> float:
    """blake2b(seed/id) / 2^64: rows below a threshold are a random share, and larger shares hold smaller ones."""
    return hash64(f"{seed}/{row_id}".encode()) / 2**64


def in_subset(row_id: str, fraction: float, seed: int = 0) -> bool:
    """Whether a row belongs to the `fraction` (0 to 1) that `seed` selects: `subset_hash` < fraction."""
    return subset_hash(row_id, seed) < fraction


def share_of_masks(fraction: float, rows: int, masks: int) -> float:
    """The share of `masks` to use so that `fraction` of the `rows` is guided: all of them where there are no more.

    Masks that were chosen already (`agevlm ground --keep`) are not chosen from again.

    Raises:
        ValueError: a fraction outside 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"mask fraction {fraction} is not between 0 and 1")
    return min(1.0, fraction * rows / max(masks, 1))


def load_masks(places: Sequence[str | Path]) -> Dataset:
    """The masks of one or several sets, to join.

    Args:
        places: folders that `agevlm ground` has written (their kept masks), Parquet files, folders of them, or sets of
            the Hub, with the columns id, query, message_index, mask, source, score.

    Raises:
        ValueError: nothing is there, or a column is missing.
    """
    found = []
    for place in places:
        masks = load_table(str(place), usual=(KEPT, "train"))
        _check_columns(f"{place}: masks", masks, list(MASK_FEATURES))
        found.append(masks.select_columns(list(MASK_FEATURES)).cast(MASK_FEATURES))
    return concatenate_datasets(found)


def masks_of(folder: str | Path, part: str) -> Dataset | None:
    """The masks that lie in a data set's own folder (or URL), None without; see `mask_files`."""
    files = mask_files(folder, part)
    return read_files(files) if files else None


def mask_files(folder: str | Path, part: str) -> list[str]:
    """Where these masks are: `masks/PART*.parquet`, `masks/train-*.parquet`, or what `agevlm ground --output
    FOLDER/masks` has kept.

    Raises:
        ValueError: several of them are there.
    """
    places = (f"masks/{part}*.parquet", "masks/train-*.parquet", f"masks/data/{KEPT}.parquet")
    found = {place: files for place in places if (files := find_files(folder, place))}
    if len(found) > 1:
        raise ValueError(f"{folder} has several sets of masks ({', '.join(found)}); say which one by --masks")
    return next(iter(found.values()), [])


def mask_numbers(row_ids: Iterable[pa.Array], mask_ids: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Number of each row's mask, -1 where it has none or does not belong to the subset: int32 (rows,).

    Args:
        row_ids: ids of the rows, in parts.

    Raises:
        ValueError: repeated ids of masks, or masks that fit no row.
    """
    _check_unique("masks", mask_ids)
    wanted, unknown = pa.array(mask_ids, pa.string()), set(mask_ids)
    parts, example = [], None
    for ids in row_ids:
        parts.append(pc.index_in(ids.cast(wanted.type), value_set=wanted).fill_null(-1).to_numpy(zero_copy_only=False))
        unknown.difference_update(mask_ids[number] for number in np.unique(parts[-1]) if number >= 0)
        example = ids[0].as_py() if len(ids) and example is None else example
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(mask_ids)} masks fit no row: a mask joins the row of the same id. Ids of such "
            f"masks look like {min(unknown)!r}, ids of rows like {example!r}; join the masks of the same data set, or "
            "write the ids of its rows into them"
        )
    kept = np.array([*(in_subset(row_id, fraction, seed) for row_id in mask_ids), False])  # -1 is the last
    numbers = np.concatenate(parts).astype(np.int32)
    return np.where(kept[numbers], numbers, np.int32(-1))


def join_masks(rows: Dataset, masks: Dataset, fraction: float = 1.0, seed: int = 0) -> Dataset:
    """`rows` with a column `guidance`: {query, message_index, mask, source, score}, null where a row has none.

    Args:
        rows: data set with a unique string column `id`.
        masks: data set with the columns `id`, query, message_index, mask, source, score; ids are unique.
        fraction: share of the masks to use, chosen by a hash of the row id and `seed`.

    Raises ValueError for a fraction outside 0 to 1, missing columns, repeated ids, and masks that fit no row.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"mask fraction {fraction} is not between 0 and 1")
    _check_columns("rows", rows, ["id"])
    _check_columns("masks", masks, ["id", *GUIDANCE])
    if "guidance" in rows.column_names:
        raise ValueError("rows already have a column guidance; remove it before joining masks")
    row_ids = list(rows["id"])
    _check_unique("rows", row_ids)
    numbers = mask_numbers([pa.array(row_ids, pa.string())], list(masks["id"]), fraction, seed)
    features = Features({"guidance": {field: masks.features[field] for field in GUIDANCE}})
    guidance = pa.nulls(len(rows), features.arrow_schema.field("guidance").type)
    if len(masks) and len(rows):
        table = masks.select_columns(list(GUIDANCE)).with_format("arrow")[:].take(pa.array(numbers.clip(0)))
        guidance = _struct(table, pa.array(numbers < 0), features)
    fingerprint = digest(f"{rows._fingerprint}{masks._fingerprint}{fraction}{seed}", size=8)
    joined = Dataset(pa.table([guidance], schema=features.arrow_schema), fingerprint=fingerprint)
    return concatenate_datasets([rows, joined], axis=1)


def _struct(table: pa.Table, missing: pa.Array, features: Features) -> pa.Array:
    kind = features.arrow_schema.field("guidance").type
    columns = [table.column(field.name).combine_chunks().cast(field.type) for field in kind]
    return pa.StructArray.from_arrays(columns, fields=list(kind), mask=missing)


def _check_columns(what: str, data: Dataset, wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in data.column_names]
    if missing:
        raise ValueError(f"{what} lack the column {', '.join(missing)}; they have {', '.join(data.column_names)}")


def _check_unique(what: str, ids: Sequence[str]) -> None:
    if len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"{what} have the id {twice!r} more than once; ids must be unique")
