"""`agevlm ground view`: one self-contained page to judge masks by eye.

For each row the picture with what the grounding model drew, the mask's outline (or that of each phrase in a color of
its own), and the cells of the grid; rows are a fixed random share of the kept and of the rejected ones, sorted and
filtered in the page.
"""

import heapq
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw

from agevlm.data.masks import OCCURRENCE, subset_hash
from agevlm.data.rows import undecoded
from agevlm.data.tables import check_columns
from agevlm.drawing import outline, outline_phrases
from agevlm.images import data_address, open_image
from agevlm.store import read_json, write_text

from .output import SPLITS, SUMMARY, environment, read_masks
from .regions import Grid


SIDE = 240
_SORTED = ("score", "area", "grid_cells")


def write_view(run: Path, rows: Dataset | None, path: Path, grid: Grid, count: int = 100) -> int:
    """Writes the page and returns how many rows are on it.

    Args:
        run: folder of a complete run.
        rows: the data set of the run, for its pictures; None shows masks alone.
        count: rows of each split.
    """
    chosen: list[list[dict[str, Any]]] = []
    for split in SPLITS:
        masks = read_masks(run, split)
        ids = list(masks["id"])
        first = {*heapq.nsmallest(count, {*ids}, key=subset_hash)}
        found = undecoded(masks.select([index for index, row_id in enumerate(ids) if row_id in first]))
        chosen.extend(list(parts) for _, parts in groupby(found, key=lambda part: part["id"]))
    pictures = {}
    if rows is not None:
        check_columns("rows", rows.column_names, ["id", "images"])
        wanted = {parts[0]["id"] for parts in chosen}
        places = [index for index, row_id in enumerate(rows["id"]) if row_id in wanted]
        for row in undecoded(rows.select(places).select_columns(["id", "images"])):
            pictures[row["id"]] = row["images"][0] if row["images"] else None
    summary = read_json(run / SUMMARY)
    page = (
        environment()
        .get_template("view.html.jinja")
        .render(
            name=run.resolve().name,
            rows=[_entry(parts, pictures.get(parts[0]["id"]), grid) for parts in chosen],
            statuses=sorted({part["status"] for parts in chosen for part in parts}),
            **{name: summary[name] for name in ("backend", "query_source", "kept", "attempted")},
        )
    )
    write_text(path, page)
    return len(chosen)


def _entry(parts: list[dict[str, Any]], stored: Any, grid: Grid) -> dict[str, Any]:
    """A row on the page, of its one mask or of those of its phrases."""
    row_id = parts[0]["id"]
    try:
        image = open_image(stored, row_id) if stored else None
    except ValueError:
        image = None  # its status says so
    phrases = [(part["query"], open_image(part["mask"], row_id, mode="1")) for part in parts if part["mask"]]
    if image is None and phrases:
        image = Image.new("RGB", phrases[0][1].size, "white")
    shown = [("picture", image and _drawn(image, parts)), ("mask", None), ("grid", None)]
    if image is not None and phrases:
        union = np.logical_or.reduce([np.array(mask) for _, mask in phrases])
        by_phrase = OCCURRENCE in parts[0]
        shown[1] = ("mask", outline_phrases(image, phrases) if by_phrase else outline(image, phrases[0][1]))
        if union.any():
            shown[2] = ("grid", _on_grid(image, union, grid))
    return {
        "id": row_id,
        "parts": parts,
        **{name: min((part[name] for part in parts if part[name] is not None), default=-1) for name in _SORTED},
        "pictures": [
            (title, data_address(picture, "jpeg", 85, SIDE) if picture else None) for title, picture in shown
        ],
    }


def _drawn(image: Image.Image, parts: list[dict[str, Any]]) -> Image.Image:
    image = image.copy()
    pen, width = ImageDraw.Draw(image), max(1, max(image.size) // 150)
    for part in parts:
        for box in part["boxes"] or []:
            pen.rectangle(box, outline=(0, 160, 255), width=width)
        for polygon in part["polygons"] or []:
            pen.polygon(polygon, outline=(255, 200, 0), width=width)
    return image


def _on_grid(image: Image.Image, mask: np.ndarray, grid: Grid) -> Image.Image:
    """The picture, dark outside of the cells that guidance sees."""
    light = grid.grid_to_pixels(grid.mask_to_grid(mask).astype(np.float32), mask.shape)  # type: ignore[arg-type]
    pixels = np.asarray(image, dtype=np.float32) * (0.25 + 0.75 * light[..., None])
    return Image.fromarray(pixels.astype(np.uint8))
