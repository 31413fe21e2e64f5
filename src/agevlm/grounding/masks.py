"""Masks as arrays: drawing polygons, growing and shrinking, comparing, storing (PNG, COCO RLE).

Arrays are bool `(height, width)`. Boxes are [left, top, right, bottom] in pixels of the picture, right and bottom
excluded. Polygons are flat lists [x0, y0, x1, y1, ...]; an instance is a list of polygons (its pieces).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from agevlm.images import open_image, stored


Box = list[float]
Polygon = list[float]


def usable_pieces(pieces: Sequence[Sequence[float]]) -> list[Polygon]:
    """The pieces of an instance that enclose anything: three points or more (an odd last number is dropped)."""
    even = [list(map(float, piece[: len(piece) // 2 * 2])) for piece in pieces]
    return [piece for piece in even if len(piece) >= 6]


def clip_box(box: Sequence[float], size: tuple[int, int]) -> Box | None:
    """A box cut to a picture of (width, height); None where less than a pixel of it, or nothing finite, is left."""
    if not np.isfinite(box).all():
        return None
    width, height = size
    left, right = sorted((min(max(box[0], 0), width), min(max(box[2], 0), width)))
    top, bottom = sorted((min(max(box[1], 0), height), min(max(box[3], 0), height)))
    return [left, top, right, bottom] if right - left >= 1 and bottom - top >= 1 else None


def polygon_box(pieces: Sequence[Sequence[float]], size: tuple[int, int]) -> Box | None:
    """The box around all usable pieces of an instance, cut to the picture; None where nothing of it is inside.

    Self-crossing pieces are no matter: a box asks for extremes only.
    """
    points = np.array([value for piece in usable_pieces(pieces) for value in piece]).reshape(-1, 2)
    if not len(points):
        return None
    return clip_box([*points.min(0), *points.max(0)], size)


def mask_box(mask: np.ndarray) -> Box | None:
    """The smallest box around a mask, None for an empty one."""
    box = Image.fromarray(mask).getbbox()
    return None if box is None else list(map(float, box))


def draw_polygons(pieces: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """The union of the usable pieces on a picture of (width, height): the pixels whose center is inside.

    As in COCO, a rectangle from 2 to 6 is four pixels wide, as the box of these ends is.
    """
    width, height = size
    union = np.zeros((height, width), dtype=bool)
    for piece in usable_pieces(pieces):
        points = np.clip(piece, -1e9, 1e9).reshape(-1, 2)
        crossed = np.zeros((height, width + 1), dtype=bool)  # where a row of pixels enters or leaves the piece
        for (x, y), (to_x, to_y) in zip(points, np.roll(points, -1, axis=0), strict=True):
            first, last = np.ceil(np.clip(sorted((y, to_y)), 0, height) - 0.5).astype(int)
            rows = np.arange(max(first, 0), last)
            if len(rows):
                ends = x + (rows + 0.5 - y) * ((to_x - x) / (to_y - y))
                crossed[rows, np.ceil(np.clip(ends, 0, width) - 0.5).astype(int)] ^= True
        union |= np.logical_xor.accumulate(crossed, axis=1)[:, :width]
    return union


# -- shape -----------------------------------------------------------------------------------------------------------


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """All pixels at most `radius` rows and columns away from the mask."""
    for axis in (0, 1):
        length = mask.shape[axis]
        sums = np.cumsum(np.moveaxis(mask, axis, 0), axis=0, dtype=np.int32)
        sums = np.concatenate([np.zeros_like(sums[:1]), sums])
        low = np.clip(np.arange(length) - radius, 0, length)
        high = np.clip(np.arange(length) + radius + 1, 0, length)
        mask = np.moveaxis(sums[high] > sums[low], 0, axis)
    return mask


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """The pixels whose whole neighborhood is in the mask; the border of the picture takes nothing away."""
    return ~dilate(~mask, radius)


def border(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of a mask."""
    return mask & ~erode(mask, 1)


# -- comparison ------------------------------------------------------------------------------------------------------


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union in [0, 1]; of two empty masks 1."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def boundary_f(first: np.ndarray, second: np.ndarray, tolerance: float = 0.008) -> float:
    """F-measure of the borders in [0, 1] (DAVIS, Perazzi et al. 2016): a border pixel counts where the other border is
    at most `tolerance` times the picture's diagonal away (in rows and columns, at least one pixel)."""
    radius = max(1, round(tolerance * float(np.hypot(*first.shape))))
    one, other = border(first), border(second)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    precision = np.count_nonzero(one & dilate(other, radius)) / np.count_nonzero(one)
    recall = np.count_nonzero(other & dilate(one, radius)) / np.count_nonzero(other)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


# -- storage ---------------------------------------------------------------------------------------------------------


def read_mask(mask: Any, row_id: str) -> np.ndarray:
    """A row's mask, in any form that `open_image` takes, as an array."""
    return np.array(open_image(mask, f"mask of row {row_id!r}", mode="1"))


def to_png(mask: np.ndarray) -> dict[str, Any]:
    """A mask as `datasets.Image` keeps it (`images.stored`): a PNG of one bit a pixel."""
    return stored(Image.fromarray(np.ascontiguousarray(mask)))


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths: {"size": [height, width], "counts": str}."""
    try:
        from pycocotools.mask import encode
    except ImportError as error:
        raise ValueError("COCO's run lengths need pycocotools: pip install 'agevlm[coco]'") from error
    rle = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def from_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Any of COCO's three forms as a mask: polygons, run lengths in a list, compressed run lengths.

    Args:
        size: (width, height) of the picture.

    Raises:
        ValueError: it is none of them, or does not fit the size.
    """
    if isinstance(segmentation, list):
        for piece in segmentation:
            if not isinstance(piece, list) or not all(_is_number(value) for value in piece):
                raise ValueError(f"a polygon is a flat list of numbers [x0, y0, x1, y1, ...], got {piece!r:.80}")
        if segmentation and all(len(piece) == 2 for piece in segmentation):
            raise ValueError(
                f"a list of points; write one flat list [x0, y0, x1, y1, ...] in a list: {segmentation!r:.80}"
            )
        return draw_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError(f"a segmentation is a list of polygons or {{size, counts}}, got {segmentation!r:.80}")
    (width, height), own = size, segmentation["size"]
    if not isinstance(own, list) or len(own) != 2:
        raise ValueError(f"the size of a segmentation is [height, width], got {own!r:.80}")
    if own != [height, width]:
        raise ValueError(f"a segmentation of {own[1]} x {own[0]} on a picture of {width} x {height}; use one size")
    counts = segmentation["counts"]
    runs = _run_lengths(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise ValueError(f"counts are run lengths, whole numbers or COCO's text of them, got {counts!r:.80}")
    if sum(runs) != width * height:
        raise ValueError(f"run lengths that add up to {sum(runs)}, not to {width} x {height} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _run_lengths(text: str) -> list[int]:
    """COCO's text of run lengths: 5 bits a letter, the lowest first, bit 6 while more follow; from the fourth run on
    the difference to the run before the last.

    Raises:
        ValueError: a letter that the text cannot hold, or an end within a number.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            raise ValueError(f"counts are no run lengths: {text!r:.80}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError(f"counts end within a number: {text!r:.80}")
    return runs


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
