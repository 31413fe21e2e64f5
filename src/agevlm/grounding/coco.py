"""Masks to and from COCO's annotation files, with run lengths (extra `coco`).

A picture is one row: its annotations are written with the row's id as `file_name`, and read as one mask, their union.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm import tqdm

from agevlm.data.rows import MASK_FEATURES, undecoded
from agevlm.store import replacing, write_json

from .masks import from_segmentation, mask_box, read_mask, to_png, to_rle


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


def read_coco(path: Path, out: Path) -> int:
    """Writes the masks of a file as Parquet (columns of `MASK_FEATURES`; query and message_index where the file has
    them, else null); returns how many.

    Raises:
        ValueError: the file is no COCO file; the message names the picture and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images, grouped = content["images"], defaultdict(list)
        for annotation in content["annotations"]:
            grouped[annotation["image_id"]].append(annotation)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO file: {error!r}; it needs `images` and `annotations`") from error
    schema = MASK_FEATURES.arrow_schema
    written = 0
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for image in tqdm(images, desc="import", unit="picture"):
            annotations = grouped.get(image["id"])
            if annotations:
                writer.write_table(pa.Table.from_pylist([_row(image, annotations, path)], schema=schema))
                written += 1
    return written


def _row(image: dict[str, Any], annotations: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    try:
        size = (image["width"], image["height"])
        mask = np.zeros(size[::-1], dtype=bool)
        for annotation in annotations:
            mask |= from_segmentation(annotation["segmentation"], size)
        row_id = str(image["file_name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, image {image.get('id')!r}: {error}; correct it or leave the picture out") from error
    first = annotations[0]
    return {
        "id": row_id,
        "query": first.get("query"),
        "message_index": first.get("message_index"),
        "mask": {"bytes": to_png(mask), "path": None},
        "source": "coco",
        "score": first.get("score"),
    }
