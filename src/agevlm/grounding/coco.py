"""Masks to and from COCO's annotation files, with run lengths (extra `coco`).

A picture is one row: its annotations are written with the row's id as `file_name`, and read as one mask, their union.
"""

import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm import tqdm

from agevlm.data.rows import MASK_FEATURES, undecoded
from agevlm.images import MAX_PIXELS
from agevlm.store import read_json, replacing, write_json

from .masks import from_segmentation, mask_box, read_mask, to_png, to_rle
from .rows import find_query


def write_coco(masks: Dataset, path: Path, progress: bool = True) -> int:
    """Writes one annotation for every mask; returns how many."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in tqdm(undecoded(masks), desc="export", unit="mask", disable=not progress):
        if row["mask"] is None:
            continue
        mask = read_mask(row["mask"], row["id"])
        number = len(images) + 1
        images.append({"id": number, "file_name": row["id"], "height": mask.shape[0], "width": mask.shape[1]})
        left, top, right, bottom = mask_box(mask) or (0.0, 0.0, 0.0, 0.0)
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "segmentation": to_rle(mask),
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                **{name: row[name] for name in ("query", "message_index", "score") if name in row},
            }
        )
    categories = [{"id": 1, "name": "region"}]
    write_json(path, {"images": images, "annotations": annotations, "categories": categories}, indent=None)
    return len(annotations)


def read_coco(path: Path, out: Path, rows: Dataset | None = None, source: str = "caption") -> int:
    """Writes the masks of a file as Parquet (columns of `MASK_FEATURES`; query and message_index where the file has
    them, else null); returns how many. Pictures whose annotations cover nothing have no mask.

    Args:
        rows: rows that show the pictures. Their ids take the place of the file's names, and their texts are the
            queries where the file has none.
        source: of the query, see `find_query`.

    Raises:
        ValueError: the file is no COCO file; the message names the picture and what is wrong with it. Or its pictures
            are those of no row.
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
    schema = MASK_FEATURES.arrow_schema
    written, empty = 0, 0
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for image_id in tqdm(grouped, desc="import", unit="picture"):
            row = _row(by_id[image_id], grouped[image_id], path)
            if row is None:
                empty += 1
                continue
            found = [row] if shown is None else [{**row, **_asked(row, text)} for text in shown.get(row["id"], [])]
            if found:
                writer.write_table(pa.Table.from_pylist(found, schema=schema))
            written += len(found)
    if empty:
        print(f"{empty} pictures have annotations that cover nothing; they get no mask", file=sys.stderr)
    return written


def _rows_by_picture(rows: Dataset, names: list[str], source: str, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Id, query and message_index of the rows that show each picture, by its name in the file: the path that a row
    has for its first picture, or the end of it."""
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
        found[name].append({"id": row["id"], "query": query[1], "message_index": query[2]})
    if not found:
        raise ValueError(
            f"{path}: no file_name, such as {next(iter(names), None)!r}, is a picture of the {len(rows)} rows, as "
            f"{place!r}; give the file_name as rows have it"
        )
    return found


def _asked(row: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """A row's id, with its text where the mask has none."""
    return text if row["query"] is None or row["message_index"] is None else {"id": text["id"]}


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
    first = annotations[0]
    return {
        "id": image["file_name"],
        "query": _field(first, "query", str, path, optional=True),
        "message_index": _field(first, "message_index", int, path, optional=True),
        "mask": {"bytes": to_png(mask), "path": None},
        "source": "coco",
        "score": _field(first, "score", (int, float), path, optional=True),
    }
