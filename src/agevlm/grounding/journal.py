"""The journal of a run: one Arrow stream for each process, appended to after every batch, readable up to the last one.

A killed process loses the batch in flight. The torn end of its journal is cut off when the run resumes; journals of
other processes, of this run or of an earlier one with more processes, are only read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

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
    """All journals of a folder as one table `data`, mapped into memory rather than read."""

    def __init__(self, folder: Path, schema: pa.Schema):
        batches = [batch for path in sorted(folder.glob("*.arrows")) for batch in read(path, schema)[0]]
        self.data = pa.Table.from_batches(batches, schema)
        # The first of several: none should be, but a copy of a journal must not double its rows.
        self.indices, self.first = np.unique(self.column("index"), return_index=True)

    def column(self, name: str) -> np.ndarray:
        """One column, in the order of the files."""
        return self.data.column(name).to_numpy()

    def tables(self, size: int = 512) -> Iterator[pa.Table]:
        """The rows in the order of the column `index`, `size` at a time."""
        rows = Dataset(self.data, fingerprint="journals").select(self.first)
        return rows.with_format("arrow").iter(batch_size=size)
