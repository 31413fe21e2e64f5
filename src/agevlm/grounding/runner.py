"""Grounding a data set: batches through a backend, a journal that survives a kill, several processes.

Every process takes its share of the rows that no journal has yet, so a run can be interrupted at any time and resumed,
also with another number of processes. The main process writes the output when all have finished.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader

from agevlm.data.rows import MAX_PHRASES, ROW_FEATURES, content_digest
from agevlm.data.tables import check_columns
from agevlm.progress import Bar
from agevlm.store import check_same, digest, read_json, write_json

from .choices import BY_PHRASE, QUERY_SOURCES
from .filters import Filters
from .journal import BatchJournal, Journals
from .masks import to_png
from .output import JOURNAL_FEATURES, SUMMARY, schema_of, write_output
from .regions import BAD_PICTURE, BAD_ROW, ERROR, GROUNDED, NO_QUERY, TEXT_TOO_LONG, Backend, Grid, Grounding
from .rows import Item, Items, choose_rows, split_phrases


MANIFEST = "run.json"
JOURNALS = "journal"
STRICT = (BAD_PICTURE, BAD_ROW, NO_QUERY, TEXT_TOO_LONG, ERROR)


def ground(
    rows: Dataset,
    out: str | Path,
    backend: Callable[[], Backend],
    *,
    backend_name: str,
    grid: Grid,
    dataset_name: str = "",
    query_source: str = "caption",
    by_phrase: bool = False,
    filters: Filters = Filters(),  # noqa: B008 - frozen
    attempt: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    strict: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Grounds `rows` and writes `out`; resumes an interrupted run.

    Args:
        rows: id, images, messages; ids are unique.
        backend: makes the backend; called only if there is something left to do.
        grid: the image processor of the model that will be trained on the masks.
        by_phrase: write a mask for each phrase, up to 8 a row.
        attempt: how many rows to try, by a hash of their ids (None: all).
        num_workers: processes that read and decode ahead.
        strict: stop at a row that cannot be used instead of recording it.
        settings: other settings that decide the backend's masks.

    Returns:
        The content of `summary.json`; None in all processes but the main one.

    Raises:
        ValueError: `out` holds another run, a column is missing, ids repeat, the backend names no phrases, or with
            `strict` a row that cannot be used.
    """
    out, state = Path(out), PartialState()
    if query_source not in QUERY_SOURCES:
        raise ValueError(f"the query is {query_source!r}; use one of {', '.join(QUERY_SOURCES)}")
    if by_phrase and backend_name.partition("+")[0] not in BY_PHRASE:
        raise ValueError(f"the backend {backend_name} tells no phrases; use {', '.join(BY_PHRASE)} (and +sam2, +sam)")
    check_columns(dataset_name or "rows", rows.column_names, ROW_FEATURES)
    ids = list(rows["id"])
    _check_unique(ids)
    manifest: dict[str, Any] = {
        "format": 1,
        "dataset": dataset_name,
        "rows": len(ids),
        "ids": digest("\n".join(map(str, ids)), size=8),
        "backend": backend_name,
        "query_source": query_source,
        "attempt": attempt,
        "seed": filters.seed,
        **({"by_phrase": True} if by_phrase else {}),
        "grid": {name: grid.to_dict()[name] for name in ("geometry", "size", "cell_size")},
    }
    places = choose_rows(ids, attempt, filters.seed)
    del ids
    content = [content_digest(rows.select(places), ["images", "messages"]) if state.is_main_process else None]
    manifest |= {"content": broadcast_object_list(content)[0], "settings": dict(settings or {})}
    found = _read_manifest(out, manifest)
    schema, most = schema_of(JOURNAL_FEATURES, by_phrase), MAX_PHRASES if by_phrase else 1
    done = np.unique(Journals(out / JOURNALS, schema).indices // most) if found else np.zeros(0, np.int64)
    mine = np.setdiff1d(places, done)[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # nobody writes before all have read
    if len(places) > len(done):
        model = backend()
        manifest["revisions"] = dict(model.revisions)
        if found and found["revisions"] != manifest["revisions"]:
            raise ValueError(
                f"{out} was begun with {found['revisions']}, now it is {manifest['revisions']}; pass the same models "
                "(--grounder-revision, --segmenter-revision), or choose another folder"
            )
        if state.is_main_process and not found:
            (out / JOURNALS).mkdir(parents=True, exist_ok=True)
            write_json(out / MANIFEST, manifest)
        state.wait_for_everyone()
        (out / SUMMARY).unlink(missing_ok=True)
        with BatchJournal(out / JOURNALS / f"{state.process_index:05d}.arrows", schema) as journal:
            items = Items(rows, mine, query_source, decode=model.decodes)
            workers = num_workers if model.decodes else 0  # opened pictures would be decoded on their way here
            loader = DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=list)
            _work(loader, model, grid, journal, most, len(mine), strict, progress and state.is_local_main_process)
    elif found:
        manifest["revisions"] = found["revisions"]
    else:  # a data set without rows
        manifest["revisions"] = {}
        (out / JOURNALS).mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    return write_output(out, Journals(out / JOURNALS, schema), manifest, filters)


def _check_unique(ids: list[str]) -> None:
    if len(set(ids)) != len(ids):
        twice = next(row_id for row_id, count in Counter(ids).items() if count > 1)
        raise ValueError(f"the data set has the id {twice!r} more than once; masks are joined by id, make ids unique")


def _read_manifest(out: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the run that `out` holds, None for a new folder; ValueError where it holds anything else."""
    path = out / MANIFEST
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(entry.name != JOURNALS for entry in out.iterdir())):
            raise ValueError(f"{out} is in use and holds no run of `agevlm ground`; choose another folder")
        return None
    found = read_json(path)
    # A moved data set is the same one: its content says so. Revisions are known once the backend is there.
    asked = {**manifest, "dataset": None}
    check_same(out, {**found, "dataset": None, "revisions": None}, asked)
    return found


def _work(
    batches: Iterable[list[Item]],
    backend: Backend,
    grid: Grid,
    journal: BatchJournal,
    most: int,
    total: int,
    strict: bool,
    progress: bool,
) -> None:
    grounded = 0
    with Bar(total=total, desc="ground", unit="row", disable=not progress, smoothing=0.05) as bar:
        for items in batches:
            groundings = ground_batch(items, backend, strict)
            records = [
                {**record(item, part, grid), **phrase, "index": item.index * most + number}
                for item, whole in zip(items, groundings, strict=True)
                for number, (phrase, part) in enumerate(split_phrases(item, whole, most))
            ]
            for row in records:
                if strict and row["outcome"] in STRICT:
                    raise ValueError(f"row {row['id']!r}: {row['outcome']}, {row['detail']}")
            journal.append(records)
            grounded += len({row["id"] for row in records if row["outcome"] == GROUNDED})
            bar.update(len(items))
            bar.set_postfix(grounded=grounded, refresh=False)


def ground_batch(items: list[Item], backend: Backend, strict: bool = False) -> list[Grounding]:
    """Items to groundings. If a batch fails, its rows are tried one by one, so that only the culprit is lost."""
    results = [Grounding(outcome=item.outcome, detail=item.detail) for item in items]
    usable = [index for index, item in enumerate(items) if not item.outcome]

    def attempt(chosen: list[int]) -> None:
        rows = [items[index] for index in chosen]
        found = backend([row.image for row in rows], [row.text for row in rows], [row.id for row in rows])  # type: ignore
        for index, result in zip(chosen, found, strict=True):
            results[index] = result

    if not usable:
        return results
    try:
        attempt(usable)
    except Exception:
        for index in usable:
            try:
                attempt([index])
            except Exception as error:
                if strict:
                    raise
                results[index] = Grounding(outcome=ERROR, detail=f"{type(error).__name__}: {error}"[:500])
    return results


def record(item: Item, grounding: Grounding, grid: Grid) -> dict[str, Any]:
    """One row of the journal, without its index."""
    mask, score = grounding.mask, grounding.score
    area = float(mask.mean()) if mask is not None else None
    return {
        **{name: getattr(item, name) for name in ("id", "query", "text", "message_index")},
        **{name: getattr(grounding, name) for name in ("boxes", "polygons", "outcome", "detail")},
        "mask": None if mask is None else {"bytes": to_png(mask), "path": None},
        # A score that is no number says nothing good of its mask.
        "score": score if score is None or math.isfinite(score) else 0.0,
        "area": area,
        "grid_cells": None if mask is None else (int(grid.mask_to_grid(mask).sum()) if area else 0),
    }
