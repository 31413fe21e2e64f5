"""`agevlm ground view`: one page to judge masks by eye, with nothing to fetch from anywhere.

For each row the picture with what the grounding model drew, the mask's outline, and the cells of the grid; rows are
a fixed random share of the kept and of the rejected ones, sorted and filtered in the page.
"""

import heapq
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw

from agevlm.data.masks import subset_hash
from agevlm.data.rows import undecoded
from agevlm.drawing import outline
from agevlm.images import data_address, open_image
from agevlm.store import write_text

from .output import SPLITS, SUMMARY, environment, read_masks
from .regions import Grid


SIDE = 240


def write_view(run: Path, rows: Dataset | None, path: Path, grid: Grid, count: int = 100) -> int:
    """Writes the page and returns how many rows are on it.

    Args:
        run: folder of a complete run.
        rows: the data set of the run, for its pictures; None shows masks alone.
        count: rows of each split.
    """
    chosen: list[dict[str, Any]] = []
    for split in SPLITS:
        masks = read_masks(run, split)
        ids = list(masks["id"])
        first = heapq.nsmallest(count, range(len(ids)), key=lambda index: subset_hash(ids[index]))
        chosen.extend(undecoded(masks.select(sorted(first))))
    pictures = {}
    if rows is not None:
        wanted = {row["id"] for row in chosen}
        places = [index for index, row_id in enumerate(rows["id"]) if row_id in wanted]
        for row in undecoded(rows.select(places).select_columns(["id", "images"])):
            pictures[row["id"]] = row["images"][0] if row["images"] else None
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    page = (
        environment()
        .get_template("view.html.jinja")
        .render(
            name=run.resolve().name,
            rows=[_entry(row, pictures.get(row["id"]), grid) for row in chosen],
            statuses=sorted({row["status"] for row in chosen}),
            **{name: summary[name] for name in ("backend", "query_source", "kept", "attempted")},
        )
    )
    write_text(path, page)
    return len(chosen)


def _entry(row: dict[str, Any], stored: Any, grid: Grid) -> dict[str, Any]:
    try:
        image = open_image(stored, row["id"]) if stored else None
    except ValueError:
        image = None  # its status says so
    mask = open_image(row["mask"], row["id"], mode="1") if row["mask"] else None
    if image is None and mask is not None:
        image = Image.new("RGB", mask.size, "white")
    shown = [("picture", image and _drawn(image, row)), ("mask", None), ("grid", None)]
    if image is not None and mask is not None:
        shown[1] = ("mask", outline(image, mask))
        if mask.getbbox():
            shown[2] = ("grid", _on_grid(image, np.array(mask), grid))
    return {
        **{name: row[name] for name in ("id", "query", "text", "score", "area", "status", "detail")},
        "cells": row["grid_cells"],
        "boxes": len(row["boxes"] or []),
        "pictures": [
            (title, data_address(picture, "jpeg", 85, SIDE) if picture else None) for title, picture in shown
        ],
    }


def _drawn(image: Image.Image, row: dict[str, Any]) -> Image.Image:
    image = image.copy()
    pen, width = ImageDraw.Draw(image), max(1, max(image.size) // 150)
    for box in row["boxes"] or []:
        pen.rectangle(box, outline=(0, 160, 255), width=width)
    for polygon in row["polygons"] or []:
        pen.polygon(polygon, outline=(255, 200, 0), width=width)
    return image


def _on_grid(image: Image.Image, mask: np.ndarray, grid: Grid) -> Image.Image:
    """The picture, dark outside of the cells that guidance sees."""
    light = grid.grid_to_pixels(grid.mask_to_grid(mask).astype(np.float32), mask.shape)  # type: ignore[arg-type]
    pixels = np.asarray(image, dtype=np.float32) * (0.25 + 0.75 * light[..., None])
    return Image.fromarray(pixels.astype(np.uint8))
