"""Which pixels of a picture a visual token stands for, whatever the processor did to the picture.

Ours says so itself (`agevlm.processing`). Of other processors it is measured: pictures whose colors are coordinates
go through the processor, and what comes out shows where each pixel of the canvas came from and which ones show no
picture. That holds for any mix of resizing, padding, cropping and tiling, and is checked to be a straight grid.

Understood are LLaVA and FastVLM (one canvas), Idefics3 and SmolVLM (tiles and the whole picture), Qwen2-VL, 2.5-VL and
3-VL (patches merged 2 x 2). Any other way of laying out visual tokens is refused: a map on the wrong pixels is worse
than none.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    FastVlmConfig,
    Idefics3Config,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from agevlm.processing.image_processing_agevlm import fit

from .subjects import Encoded, Subject


ONE_CANVAS = (LlavaConfig, FastVlmConfig)  # and their subclasses
TILES = (Idefics3Config, SmolVLMConfig)
MERGED_PATCHES = (Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig)
COVERED = 0.999  # share of white from which a canvas pixel counts as nothing but picture


@dataclass(frozen=True)
class View:
    """A grid of cells, row by row, over a part of the picture.

    Attributes:
        box: (left, top, right, bottom) of the grid in pixels of the picture; may lie outside of it (padding).
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Cells:
    """The cells of a picture's visual tokens, V of them: those of each view in turn.

    Attributes:
        size: (height, width) of the picture.
    """

    size: tuple[int, int]
    views: tuple[View, ...]

    @property
    def count(self) -> int:
        return sum(view.rows * view.columns for view in self.views)

    def shrunk(self, side: int) -> "Cells":
        """The same cells on the picture scaled down so that its longer side has at most `side` pixels."""
        height, width = self.size
        factor = min(1.0, side / max(self.size))
        size = max(1, round(height * factor)), max(1, round(width * factor))
        x, y = size[1] / width, size[0] / height
        boxes = [
            (left * x, top * y, right * x, bottom * y) for left, top, right, bottom in (v.box for v in self.views)
        ]
        return Cells(size, tuple(replace(view, box=box) for view, box in zip(self.views, boxes, strict=True)))

    def coverage(self, mask: np.ndarray) -> np.ndarray:
        """float32 `(V,)`: share of each cell that a mask `(height, width)` of the picture covers."""
        mask = np.asarray(mask) != 0
        if mask.shape != self.size:
            raise ValueError(f"a mask of shape {mask.shape} for a picture of shape {self.size}; both must be alike")
        parts = []
        for view in self.views:
            left, top, right, bottom = view.box
            rows = _overlap(view.rows, top, bottom, self.size[0])
            columns = _overlap(view.columns, left, right, self.size[1])
            parts.append((rows @ mask.astype(np.float32) @ columns.T).reshape(-1))
        return np.concatenate(parts)

    def inside(self, mask: np.ndarray) -> np.ndarray:
        """bool `(V,)`: cells that a mask covers by half or more; in a view without any, the one with the most."""
        coverage, parts = self.coverage(mask), []
        for share in np.split(coverage, np.cumsum([view.rows * view.columns for view in self.views])[:-1]):
            cells = share >= 0.5 - 1e-6
            if not cells.any() and share.max() > 1e-12:
                cells[share.argmax()] = True
            parts.append(cells)
        return np.concatenate(parts)

    def to_pixels(self, weights: np.ndarray) -> np.ndarray:
        """Attention `(V,)` as a density, float32 `(height, width)`: 1 where it is that of an even spread over the
        picture, interpolated bilinearly; views add up. Its mean is the share of the attention that is on the picture
        (but for the interpolation at its border)."""
        weights = np.asarray(weights, dtype=np.float32)
        if weights.shape != (self.count,):
            raise ValueError(f"attention of shape {weights.shape} for {self.count} cells")
        height, width = self.size
        pixels = np.zeros(self.size, dtype=np.float32)
        start = 0
        for view in self.views:
            grid = weights[start : start + view.rows * view.columns].reshape(view.rows, view.columns)
            start += grid.size
            left, top, right, bottom = view.box
            cell = (right - left) * (bottom - top) / grid.size
            rows = _interpolation(view.rows, top, bottom, height)
            columns = _interpolation(view.columns, left, right, width)
            pixels += rows @ grid @ columns.T * np.float32(height * width / cell)
        return pixels


def _overlap(cells: int, start: float, end: float, length: int) -> np.ndarray:
    """Along one axis, the share of every cell that every pixel fills: float32 `(cells, length)`."""
    edges = np.linspace(start, end, cells + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) * cells / (end - start)).astype(np.float32)


def _interpolation(cells: int, start: float, end: float, length: int) -> np.ndarray:
    """Along one axis, the weight of every cell in every pixel: float32 `(length, cells)`, 0 outside of the grid."""
    centers = (np.arange(length) + 0.5 - start) / (end - start) * cells
    place = (centers - 0.5).clip(0, cells - 1)
    weights = (1 - np.abs(place[:, None] - np.arange(cells))).clip(0)
    return (weights * ((centers >= 0) & (centers <= cells))[:, None]).astype(np.float32)


def cells_of(subject: Subject, image: Image.Image, encoded: Encoded) -> Cells:
    """The cells of the picture of an encoded batch of one row.

    Raises:
        ValueError: an unknown layout of visual tokens, or one that is not what its class promises.
    """
    size, config = (image.height, image.width), subject.model.config
    if not subject.concatenates:
        return Cells(size, (agevlm_view(subject.processor.image_processor, size),))
    assert encoded.image_BT is not None
    count = int(encoded.image_BT[0].sum())
    if isinstance(config, MERGED_PATCHES):
        merge = subject.processor.image_processor.merge_size
        frames, height, width = encoded.inputs["image_grid_thw"][0].tolist()
        views: tuple[View, ...] = (View(height // merge, width // merge, (0, 0, size[1], size[0])),)
        if frames != 1:
            raise ValueError(f"a picture of {frames} frames; only still pictures are understood")
    elif isinstance(config, (*ONE_CANVAS, *TILES)):
        canvases = encoded.inputs["pixel_values"][0]
        if canvases.dim() == 3:
            canvases = canvases[None]  # (tiles, 3, height, width)
        rows, columns = _grid(count, *canvases.shape[0:1], *canvases.shape[-2:])
        views = tuple(View(rows, columns, box) for box in measured_boxes(subject, size, len(canvases)))
    else:
        raise ValueError(
            f"where the visual tokens of a {config.model_type!r} model lie on the picture is not known here; maps are "
            "drawn for AGE-VLM, LLaVA, FastVLM, Idefics3, SmolVLM and Qwen-VL"
        )
    cells = Cells(size, views)
    if cells.count != count:
        raise ValueError(f"the processor writes {count} visual tokens but its canvas has {cells.count} cells")
    return cells


def agevlm_view(image_processor: Any, size: tuple[int, int]) -> View:
    """Our processor's grid over a picture of (height, width)."""
    canvas = (image_processor.size["height"], image_processor.size["width"])
    (x0, y0, x1, y1), (left, top, right, bottom) = fit(size, canvas, image_processor.geometry)
    across, down = (x1 - x0) / (right - left), (y1 - y0) / (bottom - top)
    box = (x0 - left * across, y0 - top * down, x1 + (canvas[1] - right) * across, y1 + (canvas[0] - bottom) * down)
    rows, columns = image_processor.grid
    return View(rows, columns, box)


def _grid(count: int, tiles: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a canvas whose share of `count` tokens are square cells."""
    per_tile, rest = divmod(count, tiles)
    cell = round((height * width / per_tile) ** 0.5) if per_tile else 0
    if rest or not cell or height % cell or width % cell or (height // cell) * (width // cell) != per_tile:
        raise ValueError(
            f"{count} visual tokens are no grid on {tiles} canvas(es) of {width} x {height} pixels: there are tokens "
            "that stand for no place (a class token, line ends), or the layout is another one"
        )
    return height // cell, width // cell


def measured_boxes(subject: Subject, size: tuple[int, int], tiles: int) -> list[tuple[float, float, float, float]]:
    """Where each canvas of a processor lies on a picture of (height, width), in pixels of the picture.

    Raises:
        ValueError: a canvas that is no straight, unturned part of the picture.
    """
    height, width = size
    ramp_x = np.broadcast_to(np.round((np.arange(width) + 0.5) / width * 255)[None, :], size)
    ramp_y = np.broadcast_to(np.round((np.arange(height) + 0.5) / height * 255)[:, None], size)
    ramps = np.stack([ramp_x, ramp_y, np.full(size, 255)], axis=-1).astype(np.uint8)
    black, white, probe = (
        _canvases(subject.processor.image_processor, Image.fromarray(pixels), tiles)
        for pixels in (np.zeros_like(ramps), np.full_like(ramps, 255), ramps)
    )
    span = np.abs(white - black).max((0, 2, 3), keepdims=True)
    shown, share = (white - black) / span, (probe - black) / span
    boxes = []
    for tile in range(tiles):
        full = shown[tile].min(0) >= COVERED
        left, right = _line(share[tile, 0], full, width)
        top, bottom = _line(share[tile, 1].T, full.T, height)
        boxes.append((left, top, right, bottom))
    return boxes


def _canvases(image_processor: Any, image: Image.Image, tiles: int) -> np.ndarray:
    """float64 `(tiles, 3, height, width)`."""
    values = image_processor(images=[[image]], return_tensors="pt")["pixel_values"]
    values = values.reshape(-1, *values.shape[-3:]).to(torch.float64).numpy()
    if values.shape[:2] != (tiles, 3):
        raise ValueError(f"the processor makes {values.shape} of a picture by itself but {tiles} canvas(es) here")
    return values


def _line(share: np.ndarray, full: np.ndarray, length: int) -> tuple[float, float]:
    """Both ends of a canvas along its second axis, in pixels of the picture, by a straight line through the
    coordinates `share (other, along)`, which are 0 to 1 where `full`."""
    counts = full.sum(0)
    seen = counts > 0
    coordinates = (share * full).sum(0)[seen] / counts[seen] * length
    places = np.nonzero(seen)[0] + 0.5
    if length == 1 and len(places):  # no ramp: all that shows the picture is its one pixel
        slope = 1 / (places[-1] - places[0] + 1)
        start = -slope * (places[0] - 0.5)
        return float(start), float(start + slope * share.shape[1])
    # Resampling flattens the ramp at the picture's own border; its inside is straight.
    inner = (coordinates > 1.5) & (coordinates < length - 1.5)
    if inner.sum() >= 3:
        places, coordinates = places[inner], coordinates[inner]
    if len(places) < 2:
        raise ValueError("a canvas shows less than two columns or rows of the picture; its place cannot be measured")
    slope, start = np.polyfit(places, coordinates, 1)
    error = np.abs(slope * places + start - coordinates).max()
    if slope <= 0 or error > 2 + 0.02 * length:
        raise ValueError(
            f"the processor does not lay the picture straight onto its canvas (off by {error:.1f} pixels); maps "
            "cannot be brought back to the picture"
        )
    return float(start), float(start + slope * share.shape[1])
