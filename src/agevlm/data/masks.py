"""Joins a data set of guidance masks to a data set of rows by id, for all rows or for a stable share of them.

A set with the column `occurrence` has one entry a phrase: entries of the same id, one after another, guide one row.

A share is decided by a hash of the row's id: it needs no list, holds for any order of the rows, and larger shares
contain smaller ones.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, concatenate_datasets

from agevlm.store import digest

from .duplicates import hash64
from .rows import GUIDANCE, MASK_FEATURES, PHRASE_FEATURES
from .tables import check_columns, find_files, load_table, read_files


OCCURRENCE = "occurrence"
MASKS, PHRASES = "masks", "phrases"  # folders of a data set: one mask a row, one a phrase
KEPT = "kept"  # the split of `agevlm ground` that holds its good masks


def subset_hash(row_id: str, seed: int = 0) -> float:
    """blake2b(seed/id) / 2^64: rows below a threshold are a random share, and larger shares hold smaller ones."""
    return hash64(f"{seed}/{row_id}".encode()) / 2**64


def in_subset(row_id: str, fraction: float, seed: int = 0) -> bool:
    """Whether a row belongs to the `fraction` (0 to 1) that `seed` selects: `subset_hash` < fraction."""
    return subset_hash(row_id, seed) < fraction


def share_of_masks(fraction: float, rows: int, masks: int) -> float:
    """The share of rows with masks, `masks` of them, to guide so that `fraction` of the `rows` is guided: all of them
    where there are no more.

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
            the Hub, with the columns id, query, message_index, mask, source, score; `occurrence` in all or in none.

    Raises:
        ValueError: nothing is there, or a column is missing.
    """
    found = []
    for place in places:
        masks = load_table(str(place), usual=(KEPT, "train"))
        check_columns(place, masks.column_names, MASK_FEATURES)
        features = PHRASE_FEATURES if OCCURRENCE in masks.column_names else MASK_FEATURES
        found.append(masks.select_columns(list(features)).cast(features))
    if len({len(masks.column_names) for masks in found}) > 1:
        names = ", ".join(map(str, places))
        raise ValueError(f"of {names} only some have the column {OCCURRENCE}: masks by phrase and by row do not mix")
    return concatenate_datasets(found)


def masks_of(folder: str | Path, part: str, by_phrase: bool = False) -> Dataset | None:
    """The masks that lie in a data set's own folder (or URL), None without; see `mask_files`."""
    files = mask_files(folder, part, by_phrase)
    return read_files(files) if files else None


def mask_files(folder: str | Path, part: str, by_phrase: bool = False) -> list[str]:
    """Where these masks are: `masks/PART*.parquet`, `masks/train-*.parquet`, or what `agevlm ground --output
    FOLDER/masks` has kept; masks by phrase likewise in `phrases`.

    Raises:
        ValueError: several of them are there.
    """
    kind = PHRASES if by_phrase else MASKS
    places = (f"{kind}/{part}*.parquet", f"{kind}/train-*.parquet", f"{kind}/data/{KEPT}.parquet")
    found = {place: files for place in places if (files := find_files(folder, place))}
    if len(found) > 1:
        raise ValueError(f"{folder} has several sets of masks ({', '.join(found)}); say which one by --masks")
    return next(iter(found.values()), [])


def mask_places(masks: Dataset) -> tuple[list[str], np.ndarray]:
    """The ids of the rows that masks guide, and where the masks of each begin, with the end of the last: (ids + 1,).

    Raises:
        ValueError: repeated ids; under the column `occurrence`, entries of an id that do not stand together.
    """
    ids = list(masks["id"])
    starts = np.arange(len(ids) + 1)
    if OCCURRENCE in masks.column_names:
        starts = np.array([place for place in starts if place in (0, len(ids)) or ids[place] != ids[place - 1]])
        ids = [ids[start] for start in starts[:-1]]
    check_unique("masks", ids)
    return ids, starts


def mask_numbers(row_ids: Iterable[pa.Array], mask_ids: Sequence[str], fraction: float, seed: int = 0) -> np.ndarray:
    """Number of each row's mask, -1 where it has none or does not belong to the subset: int32 (rows,).

    Args:
        row_ids: ids of the rows, in parts.
        mask_ids: of `mask_places`.

    Raises:
        ValueError: masks that fit no row.
    """
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
    """`rows` with a column `guidance`: {query, message_index, mask, source, score}, null where a row has none; a list
    of them, with `occurrence`, where the masks have that column.

    Args:
        rows: data set with a unique string column `id`.
        masks: data set with the columns `id`, query, message_index, mask, source, score, and maybe `occurrence`; see
            `mask_places`.
        fraction: share of the masks to use, chosen by a hash of the row id and `seed`.

    Raises ValueError for a fraction outside 0 to 1, missing columns, repeated ids, and masks that fit no row.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"mask fraction {fraction} is not between 0 and 1")
    check_columns("rows", rows.column_names, ["id"])
    check_columns("masks", masks.column_names, MASK_FEATURES)
    if "guidance" in rows.column_names:
        raise ValueError("rows already have a column guidance; remove it before joining masks")
    row_ids = list(rows["id"])
    check_unique("rows", row_ids)
    mask_ids, starts = mask_places(masks)
    numbers = mask_numbers([pa.array(row_ids, pa.string())], mask_ids, fraction, seed)
    by_phrase = OCCURRENCE in masks.column_names
    phrase = {field: masks.features[field] for field in (*GUIDANCE, *[OCCURRENCE] * by_phrase)}
    features = Features({"guidance": List(phrase) if by_phrase else phrase})
    guidance = pa.nulls(len(rows), features.arrow_schema.field("guidance").type)
    if len(masks) and len(rows):
        lengths = np.where(numbers < 0, 0 if by_phrase else 1, np.diff(starts)[numbers])
        ends = lengths.cumsum()
        # Entry by entry: the masks of the first row that has some, then those of the next
        places = np.arange(lengths.sum()) - np.repeat(ends - lengths - starts[numbers.clip(0)], lengths)
        table = masks.select_columns(list(phrase)).with_format("arrow")[:].take(pa.array(places))
        guidance = _struct(table, None if by_phrase else pa.array(numbers < 0), Features({"guidance": phrase}))
        if by_phrase:
            offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
            guidance = pa.ListArray.from_arrays(offsets, guidance, mask=pa.array(numbers < 0))
            guidance = guidance.cast(features.arrow_schema.field("guidance").type)
    fingerprint = digest(f"{rows._fingerprint}{masks._fingerprint}{fraction}{seed}", size=8)
    joined = Dataset(pa.table([guidance], schema=features.arrow_schema), fingerprint=fingerprint)
    return concatenate_datasets([rows, joined], axis=1)


def _struct(table: pa.Table, missing: pa.Array | None, features: Features) -> pa.Array:
    kind = features.arrow_schema.field("guidance").type
    columns = [table.column(field.name).combine_chunks().cast(field.type) for field in kind]
    return pa.StructArray.from_arrays(columns, fields=list(kind), mask=missing)


def check_unique(what: str, ids: Sequence[str]) -> None:
    """Raises ValueError where an id repeats."""
    if len(set(ids)) != len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"{what} have the id {twice!r} more than once; ids must be unique")
