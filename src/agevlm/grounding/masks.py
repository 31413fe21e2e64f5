"""Masks as arrays: drawing polygons, growing and shrinking, comparing, storing (PNG, COCO RLE).

Arrays are bool `(height, width)`. Boxes are [left, top, right, bottom] in pixels of the picture, right and bottom
excluded. Polygons are flat lists [x0, y0, x1, y1, ...]; an instance is a list of polygons (its pieces).
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from agevlm.images import open_image


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
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def draw_polygons(pieces: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """The union of the usable pieces on a picture of (width, height)."""
    canvas = Image.new("1", size)
    pen = ImageDraw.Draw(canvas)
    for piece in usable_pieces(pieces):
        pen.polygon(piece, fill=1)
    return np.array(canvas)


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


def read_mask(stored: Any, row_id: str) -> np.ndarray:
    """A row's mask, in any form that `open_image` takes, as an array."""
    return np.array(open_image(stored, f"mask of row {row_id!r}", mode="1"))


def to_png(mask: np.ndarray) -> bytes:
    """A mask as a PNG of one bit a pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(buffer, "PNG")
    return buffer.getvalue()


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths: {"size": [height, width], "counts": str}."""
    rle = _pycocotools().encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def from_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Any of COCO's three forms as a mask: polygons, run lengths in a list, compressed run lengths.

    Args:
        size: (width, height) of the picture.

    Raises:
        ValueError: it is none of them, or does not fit the size.
    """
    if isinstance(segmentation, list):
        return draw_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError(f"a segmentation is a list of polygons or {{size, counts}}, got {segmentation!r:.80}")
    height, width = segmentation["size"]
    if (width, height) != size:
        raise ValueError(f"a segmentation of {width} x {height} on a picture of {size[0]} x {size[1]}; use one size")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != width * height or min(counts, default=0) < 0:
            raise ValueError(f"run lengths that add up to {sum(counts)}, not to {width} x {height} pixels")
        runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return runs.reshape(width, height).T
    encoded = counts.encode("ascii") if isinstance(counts, str) else counts
    return _pycocotools().decode({"size": [height, width], "counts": encoded}).astype(bool)


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError("COCO's run lengths need pycocotools: pip install 'agevlm[coco]'") from error
    return mask
