"""Converts a published data set (Cambrian, LLaVA) once to Parquet shards of our rows, which training streams.

The folder holds train-*.parquet (id, images, messages; `data/rows.py`), summary.json with all counts, and what was
dropped and repaired row by row in bad_rows.jsonl and repaired_rows.jsonl. Formats and known defects:
`data/published/records.py`, `data/published/pictures.py`.

The work lies in a hidden folder beside the result, which is renamed when all is done: the result is complete or not
there. A first pass over the rows finds equal ids; a second one writes shards, each renamed when it is complete. The
same call goes on after an interruption, and the files are the same bytes whatever the interruptions and workers.
Memory: one group of rows per worker, and 1/16 of the ids' hashes.
"""

import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from agevlm.data.duplicates import equal_groups, save_hashes
from agevlm.data.parallel import run_jobs
from agevlm.data.rows import ROW_FEATURES
from agevlm.data.tables import GroupWriter
from agevlm.store import check_same, digest, publish, read_json, read_lines, read_table, replacing, write_json

from .defaults import ROWS_PER_SHARD
from .json_records import Chunk
from .records import DROPPED, REMARKED, REPAIRED, BadRow, finding, read_record
from .sources import Source, draft_hashes, open_source, read_pictures


FORMAT = 2  # raise when the same arguments would give other rows


def convert(
    source: str | Path | Source,
    out: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    workers: int = 1,
    limit: int | None = None,
    strict: bool = False,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: bool = True,
) -> dict[str, Any]:
    """Converts `source` into the folder `out`, goes on with an interrupted conversion, or finds it done.

    Args:
        source: see `published.open_source`, or what it returns.
        images: folders and archives of the pictures. Default: beside the JSON file.
        workers: processes; with more than one, a script must guard its main part (`__main__`).
        limit: convert the first rows only.
        strict: stop at the first row that would be dropped, and leave nothing that this call has begun.
        rows_per_shard: rows of the source per shard.

    Returns:
        What summary.json holds.

    Raises:
        ValueError: no source, no pictures' folder, `out` holds something else, another process is at it, no row was
            good, or `strict` and a bad row.
    """
    out = Path(out)
    if (limit is not None and limit < 1) or rows_per_shard < 1:
        raise ValueError(f"limit ({limit}) and rows_per_shard ({rows_per_shard}) count rows; use at least 1")
    partial = out.parent / f".{out.name}.partial"
    opened = open_source(source, images, partial / "work") if isinstance(source, (str, Path)) else source
    opened.store.work = partial / "work"
    identity = identity_of(opened, limit, rows_per_shard)
    if out.exists() and any(out.iterdir()):
        summary = read_table(out / "summary.json")
        if "conversion" not in summary:
            raise ValueError(f"{out} is not empty and holds no conversion; choose another folder")
        check_same(out, summary["conversion"], identity, "conversion")
        return check_whole(out, summary)
    is_new = not (partial / "work" / "plan.json").exists()
    (partial / "work").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(partial / "work" / "lock", timeout=0):
            summary = _convert(opened, partial, identity, limit, rows_per_shard, workers, strict, progress)
            if out.exists():
                out.rmdir()
            shutil.rmtree(partial / "work")
            publish(partial, out)
    except Timeout:
        raise ValueError(f"another process is converting into {out}; wait for it, or choose another folder") from None
    except ValueError:
        if strict and is_new:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return summary


def _convert(
    source: Source, partial: Path, identity: dict, limit: int | None, size: int, workers: int, strict: bool, bar: bool
) -> dict[str, Any]:
    if (partial / "summary.json").is_file():  # interrupted between its last two steps
        return read_json(partial / "summary.json")
    work = partial / "work"
    plan = work / "plan.json"
    if not plan.is_file():
        chunks = source.chunks(size, limit)
        write_json(plan, {"identity": identity, "chunks": [vars(chunk) for chunk in chunks]}, indent=None)
    planned = read_json(plan)
    check_same(partial, planned["identity"], identity, "conversion")
    chunks = [Chunk(**chunk) for chunk in planned["chunks"]]

    state = (source, partial, len(chunks), strict)
    if not (work / "repeated.npy").is_file():
        unhashed = [chunk for chunk in chunks if not _hashes(work, chunk).is_file()]
        list(run_jobs(_hash_ids, unhashed, state, workers, "ids", bar))
        _find_repeated(work, chunks)
    unwritten = [chunk for chunk in chunks if not _shard(partial, chunk.index, len(chunks)).is_file()]
    list(run_jobs(_write_shard, unwritten, state, workers, "rows", bar))
    return _finish(source, partial, identity, chunks)


# ---- In a worker ----

State = tuple[Source, Path, int, bool]  # the folder of the work, the number of shards, and whether it is strict


def _hash_ids(state: State, chunk: Chunk) -> None:
    """Writes (hash of the id, hash of the row's text and pictures' names, place) of the rows of a chunk."""
    source, partial, *_ = state
    rows = []
    for position, record in source.records(chunk):
        try:
            rows.append((*draft_hashes(read_record(record, position)), position))
        except BadRow:
            continue  # the second pass names it
    save_hashes(_hashes(partial / "work", chunk), rows)


def _write_shard(state: State, chunk: Chunk) -> None:
    """Writes the shard of a chunk, and first what is to be said about its rows."""
    source, partial, count, strict = state
    repeated = _repeated_in(partial / "work", chunk)
    counts: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    report = partial / "work" / f"report-{chunk.index:05d}.json"
    bad, repaired = [], []
    with (
        replacing(_shard(partial, chunk.index, count)) as temporary,
        GroupWriter(temporary, ROW_FEATURES.arrow_schema) as writer,
    ):
        for position, record in source.records(chunk):
            try:
                draft = read_record(record, position)
                row = read_pictures(draft, source.store)
                row_id = draft.id
                if position in repeated:
                    kept, content = repeated[position]
                    if not kept:
                        error = BadRow("duplicate_row", "the same id and content as an earlier row")
                        error.row_id, error.source = draft.id, draft.source
                        raise error
                    row_id = f"{row_id}~{content:016x}"
                    row.notes.append(("duplicate_id", f"now {row_id}"))
            except BadRow as error:
                if strict:
                    raise ValueError(
                        f"{source.name}, row {position} (id {error.row_id!r}): {error}. Correct it, or leave out "
                        "strict: then it is dropped and listed."
                    ) from None
                counts[error.kind] += 1
                sources.setdefault(error.source or "unknown", Counter())["dropped"] += 1
                bad.append(finding(position, error.row_id, error.kind, error.detail))
                continue
            counts.update({"rows": 1, "pictures": len(row.images), **Counter(kind for kind, _ in row.notes)})
            sources.setdefault(draft.source, Counter())["rows"] += 1
            repaired += [finding(position, row_id, kind, text) for kind, text in row.notes if kind in REPAIRED]
            size = sum(len(image["bytes"]) for image in row.images)
            writer.add({"id": row_id, "images": row.images, "messages": draft.messages}, size)
        write_json(report, {"counts": counts, "sources": sources, "bad": bad, "repaired": repaired}, indent=None)


# ---- Files of the work ----


def _hashes(work: Path, chunk: Chunk) -> Path:
    return work / f"ids-{chunk.index:05d}.npy"


def _shard(partial: Path, index: int, count: int) -> Path:
    return partial / f"train-{index:05d}-of-{count:05d}.parquet"


def _find_repeated(work: Path, chunks: list[Chunk]) -> None:
    """Writes (place, whether the row is kept, hash of its content) of every row whose id an earlier row has."""
    found = array("Q")
    for group in equal_groups([_hashes(work, chunk) for chunk in chunks]):
        seen = {int(group[0, 1])}
        for _, content, position in group[1:].tolist():
            found.extend((position, content not in seen, content))
            seen.add(content)
    rows = np.frombuffer(found, dtype=np.uint64).reshape(-1, 3)
    with replacing(work / "repeated.npy") as temporary:
        np.save(temporary, rows[np.argsort(rows[:, 0])], allow_pickle=False)


def _repeated_in(work: Path, chunk: Chunk) -> dict[int, tuple[bool, int]]:
    """{place: (whether the row is kept, hash of its content)} of a chunk's rows whose id an earlier row has."""
    rows = np.load(work / "repeated.npy", mmap_mode="r", allow_pickle=False)
    start, stop = np.searchsorted(rows[:, 0], [chunk.first + 1, chunk.first + chunk.count + 1])
    return {place: (bool(kept), content) for place, kept, content in rows[start:stop].tolist()}


def _finish(source: Source, partial: Path, identity: dict, chunks: list[Chunk]) -> dict[str, Any]:
    """Joins the reports of all shards; summary.json comes last."""
    for path in partial.glob(".*.parquet"):  # of workers that were killed
        path.unlink()
    counts: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    with (
        (partial / "bad_rows.jsonl").open("w", encoding="utf-8") as bad,
        (partial / "repaired_rows.jsonl").open("w", encoding="utf-8") as repaired,
    ):
        for chunk in chunks:
            report = read_json(partial / "work" / f"report-{chunk.index:05d}.json")
            counts.update(report["counts"])
            for name, values in report["sources"].items():
                sources.setdefault(name, Counter()).update(values)
            for file, entries in ((bad, report["bad"]), (repaired, report["repaired"])):
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    if not counts["rows"]:
        shown = ", ".join(f"{kind} {counts[kind]}" for kind in DROPPED if counts[kind]) or "it is empty"
        bad_rows = read_lines(partial / "bad_rows.jsonl")
        first = f", such as row {bad_rows[0]['row']}: {bad_rows[0]['detail']}" if bad_rows else ""
        shutil.rmtree(partial)
        raise ValueError(f"no row of {source.name} is good ({shown}){first}; `agevlm data check` shows all")
    summary = {
        "rows": counts["rows"],
        "read": sum(chunk.count for chunk in chunks),
        "pictures": counts["pictures"],
        **{what: {kind: counts[kind] for kind in kinds if counts[kind]}
           for what, kinds in (("dropped", DROPPED), ("repaired", REPAIRED), ("remarked", REMARKED))},
        "sources": {name: dict(sorted(values.items())) for name, values in sorted(sources.items())},
        "shards": len(chunks),
        "conversion": identity,
    }  # fmt: skip
    write_json(partial / "summary.json", summary)
    return summary


def identity_of(source: Source, limit: int | None = None, rows_per_shard: int = ROWS_PER_SHARD) -> dict[str, Any]:
    """What decides the result: the rows by content, the pictures by the names of their folders."""
    roots = "\n".join(map(str, source.store.folders + source.store.named))
    return {
        "format": FORMAT,
        "source": source.name,
        "size": source.size,
        "content": source.digest(),
        "images": digest(roots, size=8),
        "limit": limit,
        "rows_per_shard": rows_per_shard,
    }


def check_whole(out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished conversion.

    Raises:
        ValueError: a shard is missing, cut off, or of other rows.
    """
    shards = [_shard(out, index, summary["shards"]) for index in range(summary["shards"])]
    check_rows(shards, summary["rows"], out, "convert")
    return summary


def check_rows(shards: Iterable[Path], wanted: int, out: Path, verb: str) -> None:
    """Raises ValueError where a Parquet file of the finished folder `out` is missing or cut off, or rows are."""
    rows = 0
    for shard in shards:
        try:
            rows += pq.read_metadata(shard).num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{shard} is missing or damaged ({error}); delete {out} to {verb} again") from error
    if rows != wanted:
        raise ValueError(f"{out} has {rows} rows, its summary {wanted}; delete it to {verb} again")
