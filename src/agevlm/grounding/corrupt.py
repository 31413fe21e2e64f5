"""Masks made worse on purpose, by a known amount: how good must masks be? (`examples/mask_quality.py`)

Pure functions of (mask, amount, seed). Amounts of `erode`, `dilate` and `shift` are in units of the square root of the
mask's area, so that they mean the same for small and large objects; those of `swap`, `drop` and `random` are the share
of the rows they happen to. Shape is never lost altogether: what would leave no pixel leaves one.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from . import masks


KINDS = ("erode", "dilate", "shift", "swap", "drop", "random")


def corrupt(originals: Sequence[np.ndarray], kind: str, amount: float, seed: int = 0) -> list[np.ndarray | None]:
    """The masks of a data set, corrupted in one way.

    Args:
        originals: bool `(height, width)`, not empty.
        amount: see above; 0 changes nothing.

    Returns:
        Masks of the same sizes; None where `drop` took one.

    Raises:
        ValueError: an unknown kind, a negative amount, or a share above 1.
    """
    if kind not in KINDS:
        raise ValueError(f"the corruption is {kind!r}; use one of {', '.join(KINDS)}")
    if amount < 0 or (kind in ("swap", "drop", "random") and amount > 1):
        raise ValueError(f"the amount of {kind} is {amount}; use 0 to 1 for a share of rows, 0 or more for a length")
    if kind == "erode":
        return [eroded(mask, amount) for mask in originals]
    if kind == "dilate":
        return [masks.dilate(mask, _length(mask, amount)) for mask in originals]
    generator = np.random.default_rng(seed)
    if kind == "shift":
        return [shifted(mask, amount, generator) for mask in originals]
    hit = np.flatnonzero(generator.random(len(originals)) < amount).tolist()
    result: list[np.ndarray | None] = list(originals)
    if kind == "swap":
        order = generator.permutation(hit).astype(int).tolist()
        # Round in a circle, so that none keeps its own. One row alone has nobody to swap with.
        for index, other in zip(order, order[-1:] + order[:-1], strict=True):
            result[index] = resized(originals[other], originals[index].shape)
    for index in hit:
        if kind == "drop":
            result[index] = None
        elif kind == "random":
            result[index] = random_box(originals[index], generator)
    return result


def eroded(mask: np.ndarray, amount: float) -> np.ndarray:
    """Shrunk by `amount` times the square root of its area, or as far as something is left."""
    for radius in range(_length(mask, amount), 0, -1):
        smaller = masks.erode(mask, radius)
        if smaller.any():
            return smaller
    return mask


def shifted(mask: np.ndarray, amount: float, generator: np.random.Generator) -> np.ndarray:
    """Moved by `amount` times the square root of its area in a random direction; what leaves the picture is cut off.
    Where all of it would leave, it stops at the border with one row or column inside."""
    height, width = mask.shape
    left, top, right, bottom = map(int, masks.mask_box(mask) or (0, 0, width, height))
    angle, length = generator.uniform(0, 2 * np.pi), amount * np.sqrt(mask.sum())
    down = int(np.clip(round(length * np.sin(angle)), 1 - bottom, height - 1 - top))
    across = int(np.clip(round(length * np.cos(angle)), 1 - right, width - 1 - left))
    moved = np.zeros_like(mask)
    rows, columns = np.nonzero(mask)
    rows, columns = rows + down, columns + across
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    if not inside.any():  # a corner of the box that the mask leaves free
        return mask
    moved[rows[inside], columns[inside]] = True
    return moved


def random_box(mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A box of about the mask's area anywhere in the picture."""
    height, width = mask.shape
    area = int(mask.sum())
    tall = int(np.clip(round(np.sqrt(area * generator.uniform(0.5, 2))), -(-area // width), height))
    wide = int(np.clip(round(area / tall), 1, width))
    top, left = generator.integers(height - tall + 1), generator.integers(width - wide + 1)
    box = np.zeros_like(mask)
    box[top : top + tall, left : left + wide] = True
    return box


def resized(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask stretched to another picture's size (nearest pixel; one stays where all would be passed over)."""
    if mask.shape == shape:
        return mask
    result = np.array(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
    if not result.any():
        row, column = (int(places.mean() / old * new) for places, old, new in zip(
            np.nonzero(mask), mask.shape, shape, strict=True))  # fmt: skip
        result[row, column] = True
    return result


def _length(mask: np.ndarray, amount: float) -> int:
    return round(amount * float(np.sqrt(mask.sum())))
