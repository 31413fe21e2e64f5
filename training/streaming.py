"""Rows in Parquet shards, read in place and never all at once (Cambrian: 10M rows, terabytes of pictures).

`open_shards` returns an ordinary `datasets.Dataset` of a few bytes per row: the number of each row over all shards,
and of its mask. Its transform reads rows by row groups, from a disk or over HTTP (`hf://datasets/...`), in the worker
that needs them. Trainer therefore knows the length, and a position in an epoch is one number: an interrupted run
resumes at it without reading earlier rows, with other workers and on another number of devices too.

`datasets.IterableDataset` is not used for that: its state leaves out the shuffle buffer and holds for one number of
workers, and shards of unequal length end at different steps on different devices, which then wait for ever.

What remains of streaming is the order (`shard_order`): a shuffle in which few row groups are in use at a time.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from agevlm.data.masks import OCCURRENCE, in_subset, mask_numbers, mask_places, masks_of, share_of_masks
from agevlm.data.rows import GUIDANCE, refuse_name, which_guided
from agevlm.data.tables import check_columns, find_files
from agevlm.store import digest


ROW_COLUMNS = ("id", "images", "messages")
POSITION, MASK = "position", "mask"
CACHE_BYTES = 512 * 2**20
# The order takes RUN rows from each of LANES streams in turn, and each stream shuffles WINDOW row groups at a time:
# with row groups of 100 rows some 6,000 rows are in flight over all workers of all devices together. Workers times
# devices should divide LANES; then every row group is read by one worker only.
LANES, WINDOW, RUN = 32, 2, 16


def open_shards(
    files: Sequence[str],
    masks: Dataset | None = None,
    mask_fraction: float = 1.0,
    lengths: bool = False,
) -> Dataset:
    """The rows of Parquet shards, joined with their masks, as a data set that reads on access.

    Args:
        files: paths or fsspec URLs; each file has `id`, `images` (with their bytes), `messages`, and `guidance` if its
            masks are joined already. Row groups of about 100 rows are read fastest.
        masks: data set of masks to join by id (`data/masks.py`); the ids of all shards are read for it.
        mask_fraction: share of the rows that bring their mask, chosen by a hash of the row's id; all masks where there
            are fewer.
        lengths: add the column `length`, the characters of each row's messages, for `group_by_length`.

    Returns:
        data set whose items are rows. Its own columns are numbers: `position` over all shards, `mask` (of the joined
        data set; -1: not guided) and `length`.

    Raises:
        ValueError: no files, a file that is no Parquet or lacks a column, masks that fit no row, repeated mask ids.
    """
    if not files:
        raise ValueError("There are no Parquet shards to read. Give at least one file.")
    reader = ShardReader(files, masks)
    columns: dict[str, Any] = {POSITION: np.arange(reader.num_rows)}
    if masks is not None:
        if reader.has_guidance:
            raise ValueError(f"{files[0]} has a column guidance already. Leave the separate masks out.")
        share = share_of_masks(mask_fraction, reader.num_rows, len(reader.mask_ids))
        ids = (column.combine_chunks() for column in reader.column("id"))
        columns[MASK] = mask_numbers(ids, reader.mask_ids, share)
    elif reader.has_guidance:
        columns[MASK] = reader.guided(mask_fraction)
    if lengths:
        columns["length"] = reader.lengths()
    identity = [reader.identity, mask_fraction, lengths, None if masks is None else masks._fingerprint]
    fingerprint = digest(json.dumps(identity), size=8)
    return Dataset(pa.table(columns), fingerprint=fingerprint).with_transform(reader)


def load_shards(
    folder: str,
    part: str,
    mask_fraction: float,
    lengths: bool = False,
    masks: Dataset | None = None,
    by_phrase: bool = False,
) -> Dataset | None:
    """`open_shards` for a folder; None if it has no shards.

    Shards are `part/train-*.parquet` or `data/train-*.parquet` (`agevlm data cambrian`). Without `masks`, those of the
    folder are joined (`masks_of`), those `by_phrase` if asked for.
    """
    files = find_files(folder, f"{part}/train-*.parquet") or find_files(folder, "data/train-*.parquet")
    if not files:
        return None
    masks = masks_of(folder, part, by_phrase) if masks is None else masks
    return open_shards(files, masks, mask_fraction, lengths=lengths)


def reader_of(rows: Any) -> "ShardReader | None":
    """The reader behind rows that come from `open_shards`, None for others."""
    transform = rows.format["format_kwargs"].get("transform") if isinstance(rows, Dataset) else None
    return transform if isinstance(transform, ShardReader) else None


class ShardReader:
    """The transform of `open_shards`: numbers of rows to rows.

    Files are opened and row groups kept (until they are read, at most `CACHE_BYTES`) in the process that reads; what
    travels to a worker are names and numbers.
    """

    def __init__(self, files: Sequence[str], masks: Dataset | None = None):
        self.files = list(files)
        self.masks = masks
        self.mask_ids: list[str] = []
        if masks is not None:
            self.mask_ids, self.mask_starts = mask_places(masks)
        sizes: list[np.ndarray] = []
        facts: list[str] = []
        self._forget()
        for name in self.files:
            file = self._open(name)
            check_columns(name, file.schema_arrow.names, ROW_COLUMNS)
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
            sizes.append(np.array([group.num_rows for group in groups], dtype=np.int64))
            facts.append(json.dumps([Path(name).name, *((group.num_rows, group.total_byte_size) for group in groups)]))
        self.has_guidance = "guidance" in file.schema_arrow.names
        self.identity = digest(facts)
        self.group_file = np.repeat(np.arange(len(sizes)), [len(size) for size in sizes])
        self.group_in_file = np.concatenate([np.arange(len(size)) for size in sizes])
        # First row of each row group, and one past the last row of all.
        self.starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        self._forget()

    def fingerprint(self, rows: Dataset) -> str:
        """Of the shards' footers, the rows taken and which of them are guided; no path, so it holds anywhere."""
        index = rows.with_format("numpy")[:]
        guided = index[MASK] >= 0 if MASK in index else np.zeros(0, dtype=bool)
        return digest((self.identity.encode(), index[POSITION].astype(np.int64).tobytes(), guided.tobytes()))

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}, "_cache": OrderedDict(), "_unread": {}, "_cached_bytes": 0}

    def _forget(self) -> None:
        self._opened: dict[str, pq.ParquetFile] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._unread: dict[int, int] = {}
        self._cached_bytes = 0

    def _open(self, name: str) -> pq.ParquetFile:
        if name not in self._opened:
            if len(self._opened) >= 2 * LANES * WINDOW:
                self._opened.pop(next(iter(self._opened))).close()
            filesystem, path = fsspec.core.url_to_fs(name)
            try:
                self._opened[name] = pq.ParquetFile(path, filesystem=filesystem)
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(f"{name} cannot be read as Parquet ({error}). Write the shard again.") from error
        return self._opened[name]

    def _group(self, group: int) -> pa.Table:
        """A row group, from the cache or from its file."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        name = self.files[self.group_file[group]]
        try:
            table = self._open(name).read_row_group(int(self.group_in_file[group]), use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{name}: row group {self.group_in_file[group]} cannot be read ({error}). Write the shard again."
            ) from error
        self._cache[group], self._unread[group] = table, table.num_rows
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._drop(next(iter(self._cache)))
        return table

    def _drop(self, group: int) -> None:
        self._cached_bytes -= self._cache.pop(group).nbytes
        del self._unread[group]

    def _row(self, group: int, place: int) -> dict[str, Any]:
        """One row of a row group, which is let go when as many rows as it has were read: an epoch reads each once."""
        row = self._group(group).slice(place, 1).to_pylist()[0]
        self._unread[group] -= 1
        if not self._unread[group]:
            self._drop(group)
        return row

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        positions = np.asarray(batch[POSITION])
        groups = np.searchsorted(self.starts, positions, side="right") - 1
        mask_numbers = batch.get(MASK, [-1] * len(positions))
        rows = []
        for position, group, mask in zip(positions, groups, mask_numbers, strict=True):
            row = self._row(int(group), int(position - self.starts[group]))
            guidance = None
            if mask >= 0:
                guidance = row["guidance"] if self.masks is None else self._masks_of(int(mask), self.masks)
            rows.append(refuse_name({**{name: row[name] for name in ROW_COLUMNS}, "guidance": guidance}))
        return {name: [row[name] for row in rows] for name in (*ROW_COLUMNS, "guidance")}

    def _masks_of(self, number: int, masks: Dataset) -> dict[str, Any] | list[dict[str, Any]]:
        """A row's guidance from the mask data set, its pictures undecoded."""
        start, end = self.mask_starts[number : number + 2]
        fields = [*GUIDANCE, *{OCCURRENCE} & set(masks.column_names)]
        found = masks.with_format("arrow")[int(start) : int(end)].select(fields).to_pylist()
        return found if OCCURRENCE in fields else found[0]

    # ---- Columns of the index ----

    def column(self, name: str) -> list[pa.ChunkedArray]:
        """One column of all rows, a chunked array per file."""
        return [self._open(file).read(columns=[name]).column(name.split(".")[0]) for file in self.files]

    def guided(self, fraction: float) -> np.ndarray:
        """0 for rows with guidance of their own that belong to the subset, else -1: int32 (rows,)."""
        known: list[np.ndarray] = []
        ids: list[str] = []
        for file in self.files:
            opened = self._open(file)
            paths = [opened.schema.column(place).path for place in range(len(opened.schema))]
            queries = [path for path in paths if path.startswith("guidance.") and path.endswith(".query")]
            table = opened.read(columns=["id", *queries])
            known.append(which_guided(table.column("guidance").combine_chunks()))
            ids += table.column("id").filter(pa.array(known[-1])).to_pylist()
        marks = np.where(np.concatenate(known), 0, -1).astype(np.int32)
        share = share_of_masks(fraction, self.num_rows, len(ids))
        marks[marks == 0] = [0 if in_subset(row_id, share) else -1 for row_id in ids]
        return marks

    def lengths(self) -> np.ndarray:
        """Characters of all messages of each row: int32 (rows,)."""
        lengths = []
        for column in self.column("messages"):
            for chunk in column.chunks:
                contents = chunk.flatten().field("content")
                ends = np.cumsum(np.concatenate([[0], pc.utf8_length(contents).to_numpy(zero_copy_only=False)]))
                offsets = chunk.offsets.to_numpy() - chunk.offsets[0].as_py()
                lengths.append(ends[offsets[1:]] - ends[offsets[:-1]])
        return np.concatenate(lengths).astype(np.int32)


def shard_order(starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A shuffled order of all rows in which few row groups are in use at a time: int64 (rows,).

    The row groups are shuffled and dealt to `LANES` streams, each of which shuffles `WINDOW` of them at a time. The
    order is read off the streams in turn, `RUN` rows from each.

    Args:
        starts: first row of each row group, and one past the last row: (groups + 1,).
    """
    groups = rng.permutation(len(starts) - 1)
    runs, ranks = [], []
    for lane in range(LANES):
        mine = groups[lane::LANES]
        windows = [mine[first : first + WINDOW] for first in range(0, len(mine), WINDOW)]
        rows = [rng.permutation(np.concatenate([np.arange(*starts[g : g + 2]) for g in window])) for window in windows]
        if rows:
            runs.append(np.concatenate(rows))
            # Run k of all lanes comes before run k + 1 of any; lanes that end early leave their turns to the others.
            ranks.append(np.arange(len(runs[-1])) // RUN * LANES + lane)
    return np.concatenate(runs)[np.argsort(np.concatenate(ranks), kind="stable")]
