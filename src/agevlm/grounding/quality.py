"""How good masks are against exact ones: IoU, boundary F, and IoU on the grid, which is all that guidance sees."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from agevlm.data.masks import OCCURRENCE
from agevlm.data.rows import undecoded
from agevlm.data.tables import check_columns, load_table
from agevlm.progress import Bar

from .masks import boundary_f, iou, read_mask
from .output import SUMMARY, read_masks
from .regions import Grid


METRICS = ("iou", "boundary_f", "grid_iou")


def load_masks(name: str) -> Dataset:
    """A run's kept masks, or any data set with the columns id and mask."""
    if (Path(name) / SUMMARY).is_file():
        return read_masks(name)
    masks = load_table(name)
    check_columns(name, masks.column_names, ["id", "mask"])
    return masks


def compare(mask: np.ndarray, exact: np.ndarray, grid: Grid) -> dict[str, float]:
    """The three metrics of one mask, bool `(height, width)`; 0 on the grid for an empty one.

    Raises:
        ValueError: masks of different sizes.
    """
    if mask.shape != exact.shape:
        raise ValueError(f"masks of {mask.shape} and {exact.shape} pixels; they must be of one picture")
    cells = [grid.mask_to_grid(one) if one.any() else None for one in (mask, exact)]
    on_grid = iou(*cells) if all(c is not None for c in cells) else 0.0  # type: ignore[arg-type]
    return {"iou": iou(mask, exact), "boundary_f": boundary_f(mask, exact), "grid_iou": on_grid}


def measure_quality(masks: Dataset, exact: Dataset, grid: Grid, progress: bool = True) -> dict[str, Any]:
    """Means and quartiles over the rows (or phrases) that both sets have a mask for, and how many of the exact ones
    those are. Phrases of a message are the same if the words of one hold those of the other.

    Raises:
        ValueError: no mask in common, a column is missing, or two masks of one row differ in size.
    """
    (first, found), (second, wanted) = _by_row(masks), _by_row(exact)
    counts = {"masks": sum(map(len, found.values())), "exact": sum(map(len, wanted.values()))}
    common = []
    for row, entries in wanted.items():
        for words, place in entries:
            same = [entry for entry in found[row] if entry[0] in words or words in entry[0]]
            if same:
                best = min(same, key=lambda entry: abs(len(entry[0]) - len(words)))
                found[row].remove(best)
                common.append((row[0], best[1], place))
    if not common:
        raise ValueError(
            "the two have no row with a mask in common; ids (and words of phrases) must be those of the same data set"
        )
    values = []
    for row_id, other, place in Bar(common, desc="quality", unit="mask", disable=not progress):
        mask, reference = (read_mask(row["mask"], row_id) for row in (first[other], second[place]))
        try:
            values.append(compare(mask, reference, grid))
        except ValueError as error:
            raise ValueError(f"row {row_id!r}: {error}") from error
    metrics = {name: _spread([value[name] for value in values]) for name in METRICS}
    return {**counts, "compared": len(common), **metrics}


def _by_row(data: Dataset) -> tuple[Dataset, dict[tuple, list[tuple[str, int]]]]:
    """A set of masks undecoded; by id (and message of a phrase) the words and places of its masks."""
    names = ["id", "mask", *(["query", "message_index"] if OCCURRENCE in data.column_names else ())]
    data, found = undecoded(data.select_columns(names)), defaultdict(list)
    for place, row in enumerate(data):
        if row["mask"] is not None:
            found[row["id"], row.get("message_index")].append(((row.get("query") or "").lower(), place))
    return data, found


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"mean": float(np.mean(values)), "quartile_1": low, "median": middle, "quartile_3": high}
