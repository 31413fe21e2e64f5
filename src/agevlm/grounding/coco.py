"""Masks to COCO's annotation files, with run lengths (extra `coco`): the row's id is the picture's `file_name`, and a
phrase is a category. `annotations.py` reads them.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

from agevlm.data.masks import OCCURRENCE
from agevlm.data.rows import undecoded
from agevlm.progress import Bar
from agevlm.store import write_json

from .masks import mask_box, read_mask, to_rle


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
