"""Masks to and from COCO's annotation files, with run lengths (extra `coco`).

A picture is one row: its annotations are written with the row's id as `file_name`, and read as one mask, their union,
or by phrase: a phrase is a category, and a category the phrase of the text that names it.
"""

import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from agevlm.data.masks import OCCURRENCE
from agevlm.data.rows import MASK_FEATURES, MAX_PHRASES, PHRASE_FEATURES, undecoded
from agevlm.data.scenes.words import plural
from agevlm.images import MAX_PIXELS
from agevlm.progress import Bar
from agevlm.store import read_json, replacing, write_json

from .masks import from_segmentation, mask_box, read_mask, to_png, to_rle
from .rows import find_phrase, find_query


_PHRASE = {"query": str, "message_index": int, OCCURRENCE: int}  # fields of ours in an annotation


def write_coco(masks: Dataset, path: Path, progress: bool = True) -> int:
    """Writes one annotation for every mask; returns how many."""
    images: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    for row in Bar(undecoded(masks), desc="export", unit="mask", disable=not progress):
        if row["mask"] is None:
            continue
        mask = read_mask(row["mask"], row["id"])
        image = {"id": len(images) + 1, "file_name": row["id"], "height": mask.shape[0], "width": mask.shape[1]}
        name = row["query"] if OCCURRENCE in row else "region"
        left, top, right, bottom = mask_box(mask) or (0.0, 0.0, 0.0, 0.0)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": images.setdefault(row["id"], image)["id"],
                "category_id": numbers.setdefault(name, len(numbers) + 1),
                "segmentation": to_rle(mask),
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                **{name: row[name] for name in ("query", "message_index", OCCURRENCE, "score") if name in row},
            }
        )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    content = {"images": [*images.values()], "annotations": annotations, "categories": categories}
    write_json(path, content, indent=None)
    return len(annotations)


def read_coco(
    path: Path, out: Path, rows: Dataset | None = None, source: str = "caption", by_phrase: bool = False
) -> int:
    """Writes the masks of a file as Parquet (columns of `MASK_FEATURES`; query and message_index where the file has
    them, else null); returns how many. Pictures whose annotations cover nothing have no mask.

    Args:
        rows: rows that show the pictures. Their ids take the place of the file's names, and their texts are the
            queries where the file has none.
        source: of the query, see `find_query`.
        by_phrase: a mask for each phrase (`PHRASE_FEATURES`), up to 8 a row: those of the file, or the categories that
            a row's text names, in singular or plural.

    Raises:
        ValueError: the file is no COCO file; the message names the picture and what is wrong with it. Or its pictures
            are those of no row, or it has phrases neither itself nor from rows.
    """
    content = read_json(path)
    images, annotations = (_objects(content, name, path) for name in ("images", "annotations"))
    by_id = {_field(image, "id", (int, str), path): image for image in images}
    grouped: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        grouped[_field(annotation, "image_id", (int, str), path)].append(annotation)
    if unknown := [image_id for image_id in grouped if image_id not in by_id]:
        raise ValueError(
            f"{path}: {len(unknown)} image_id of annotations are the id of no image, e.g. {unknown[0]!r}; its images "
            f"have ids as {next(iter(by_id), None)!r}"
        )
    names = [_field(image, "file_name", str, path) for image in by_id.values()]
    if len(set(names)) != len(images):
        raise ValueError(f"{path}: images repeat an id or a file_name; masks are joined by it, make it unique")
    shown = None if rows is None else _rows_by_picture(rows, names, source, path)
    listed = _objects(content, "categories", path) if by_phrase else []
    categories = {_field(item, "id", (int, str), path): _field(item, "name", str, path).strip() for item in listed}
    schema = (PHRASE_FEATURES if by_phrase else MASK_FEATURES).arrow_schema
    written, empty, many = 0, 0, 0
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for image_id in Bar(grouped, desc="import", unit="picture"):
            parts: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for annotation in grouped[image_id]:
                which = [annotation.get(name) for name in ("category_id", *_PHRASE)] if by_phrase else None
                parts[repr(which)].append(annotation)
            made = [row for part in parts.values() if (row := _row(by_id[image_id], part, path))]
            empty += not made
            found = []
            texts: list[Any] = [None] if shown is None else shown.get(by_id[image_id]["file_name"], [])
            for text in texts:
                told = (_asked(row, categories.get(row["category"], "") if by_phrase else None, text) for row in made)
                named = [{**row, **words} for row, words in zip(made, told, strict=True) if words]
                many += len(named) > MAX_PHRASES
                found += named[:MAX_PHRASES]
            if found:
                writer.write_table(pa.Table.from_pylist(found, schema=schema))
            written += len(found)
    if empty:
        print(f"{empty} pictures have annotations that cover nothing; they get no mask", file=sys.stderr)
    if many:
        print(f"{many} rows have more than {MAX_PHRASES} phrases; the first {MAX_PHRASES} are used", file=sys.stderr)
    return written


def _rows_by_picture(rows: Dataset, names: list[str], source: str, path: Path) -> dict[str, list[tuple]]:
    """Id, messages and what `find_query` finds of the rows that show each picture, by its name in the file: the path
    that a row has for its first picture, or the end of it."""
    wanted, found = set(names), defaultdict(list)
    seen: dict[str, str] = {}
    place = ""
    for row in undecoded(rows.select_columns(["id", "images", "messages"])):
        place = (row["images"] or [{}])[0].get("path") or ""
        parts = PurePosixPath(place).parts
        name = next((end for end in ("/".join(parts[at:]) for at in range(len(parts))) if end in wanted), None)
        query = find_query(row["messages"] or [], source)
        if name is None or query is None:
            continue
        if seen.setdefault(name, place) != place:
            raise ValueError(
                f"{path}: {name!r} may be {seen[name]!r} or {place!r}; give the file_name as rows have it"
            )
        found[name].append((row["id"], row["messages"], query))
    if not found:
        raise ValueError(
            f"{path}: no file_name, such as {next(iter(names), None)!r}, is a picture of the {len(rows)} rows, as "
            f"{place!r}; give the file_name as rows have it"
        )
    return found


def _asked(row: dict[str, Any], category: str | None, text: Any) -> dict[str, Any] | None:
    """The id of the row that shows a mask, with its words where the mask has none: all, or those that name the
    category. None where it does not name it."""
    row_id = row["id"] if text is None else text[0]
    if None not in (row["query"], row["message_index"]) or (text is None and category is None):
        return {"id": row_id}
    if text is None:
        raise ValueError(f"an annotation of {row_id!r} has no query; pass the rows that name its category (--rows)")
    _, messages, found = text
    if category is None:
        return {"id": row_id, "query": found[1], "message_index": found[2]}
    phrase = find_phrase(messages, found, category) or find_phrase(messages, found, plural(category))
    return {"id": row_id, **phrase} if phrase else None


def _objects(content: Any, name: str, path: Path) -> list[dict[str, Any]]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{path} is no COCO file; it needs the lists `images` and `annotations`")
    for item in found:
        if not isinstance(item, dict):
            raise ValueError(f"{path}: {name} hold {item!r:.80}, expected objects")
    return found


def _field(item: dict[str, Any], name: str, kind: Any, path: Path, optional: bool = False) -> Any:
    value = item.get(name)
    if isinstance(value, bool) or not (isinstance(value, kind) or (optional and value is None)):
        raise ValueError(f"{path}: the field {name} of {item!r:.200} is {value!r:.40}; correct it")
    return value


def _row(image: dict[str, Any], annotations: list[dict[str, Any]], path: Path) -> dict[str, Any] | None:
    """The union of a picture's annotations as a row; None where they cover nothing."""
    width, height = (_field(image, name, int, path) for name in ("width", "height"))
    if not 0 < width * height <= MAX_PIXELS or width < 0:
        raise ValueError(
            f"{path}: the image {image['id']!r} has {width} x {height} pixels, expected 1 to {MAX_PIXELS}"
        )
    mask = np.zeros((height, width), dtype=bool)
    for annotation in annotations:
        try:
            mask |= from_segmentation(annotation.get("segmentation"), (width, height))
        except ValueError as error:
            raise ValueError(
                f"{path}, image {image['id']!r}, annotation {annotation.get('id')!r}: {error}; correct it or "
                "leave it out"
            ) from error
    if not mask.any():
        return None
    told = {name: {_field(item, name, kind, path, True) for item in annotations} for name, kind in _PHRASE.items()}
    return {
        "id": image["file_name"],
        "category": annotations[0].get("category_id"),
        **{name: values.pop() if len(values) == 1 else None for name, values in told.items()},
        "mask": {"bytes": to_png(mask), "path": None},
        "source": "coco",
        "score": _field(annotations[0], "score", (int, float), path, optional=True),
    }
