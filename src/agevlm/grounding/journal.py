"""The journal of a run: one Arrow stream for each process, appended to after every batch, readable up to the last one.

A killed process loses the batch in flight. The torn end of its journal is cut off when the run resumes; journals of
other processes, of this run or of an earlier one with more processes, are only read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agevlm.store import Journal


def read(path: Path, schema: pa.Schema) -> tuple[list[pa.RecordBatch], int]:
    """The whole batches of a journal, mapped into memory rather than read, and the length in bytes that they fill.

    Raises:
        ValueError: the journal has other columns: it is another version's.
    """
    if path.stat().st_size == 0:
        return [], 0
    batches, good = [], 0
    with pa.memory_map(str(path)) as file:
        try:
            found = pa.ipc.read_schema(file)
        except (pa.ArrowInvalid, OSError):
            return [], 0
        if not found.equals(schema):
            raise ValueError(f"{path} was written by another version; choose another folder, or delete this one")
        good = file.tell()
        while True:
            try:
                message = pa.ipc.read_message(file)
                batches.append(pa.ipc.read_record_batch(message, schema))
            except (pa.ArrowInvalid, OSError, EOFError):
                return batches, good
            good = file.tell()


class BatchJournal(Journal):
    """The store's journal, of Arrow batches.

    Raises:
        ValueError: see `store.Journal` and `read`.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        super().__init__(path, whole=lambda path: read(path, schema)[1])
        self.schema = schema
        if path.stat().st_size == 0:
            self.write(memoryview(schema.serialize()))

    def append(self, rows: Iterable[Any]) -> None:
        """One batch of rows."""
        self.write(memoryview(pa.RecordBatch.from_pylist(list(rows), schema=self.schema).serialize()))


class Journals:
    """All journals of a folder as one table in the order of the column `index`, never in memory as a whole."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.schema = schema
        self.batches: list[pa.RecordBatch] = []
        for path in sorted(folder.glob("*.arrows")):
            self.batches.extend(read(path, schema)[0])
        lengths = [batch.num_rows for batch in self.batches]
        indices = self.column("index").astype(np.int64)
        batch_of = np.repeat(np.arange(len(lengths)), lengths)
        row_of = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0, np.int64)
        # The first of several: none should be, but a copy of a journal must not double its rows.
        self.indices, first = np.unique(indices, return_index=True)
        self.places = np.stack([batch_of[first], row_of[first]], axis=1)

    def __len__(self) -> int:
        return len(self.indices)

    def column(self, name: str) -> np.ndarray:
        """One column of all batches, in the order of the files."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0)

    def tables(self, size: int = 512) -> Iterator[pa.Table]:
        """The rows in order, `size` at a time."""
        for start in range(0, len(self), size):
            places = self.places[start : start + size]
            parts, order = [], []
            for batch in np.unique(places[:, 0]):
                here = np.flatnonzero(places[:, 0] == batch)
                parts.append(self.batches[batch].take(pa.array(places[here, 1])))
                order.append(here)
            back = np.argsort(np.concatenate(order))
            yield pa.Table.from_batches(parts, self.schema).take(pa.array(back)).combine_chunks()
