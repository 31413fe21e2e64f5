"""Image processing of AGE-VLM: one geometry for pictures, masks and attention maps (paper section 3.2.2, appendix C).

A picture is fitted onto a square canvas (768 pixels, a grid of 24 x 24 visual cells) in one of three ways:
- `pad` (default): the whole picture, centred on CLIP's mean colour. Cells that show no picture are reported in
  `visual_token_mask`, so that the model never attends to them. The paper leaves its own policy open and blames
  unmasked padding for stray attention.
- `stretch`: the whole picture, aspect ratio given up.
- `crop`: the centre, filling the canvas.

`mask_to_grid` takes a mask of the original picture through the same fit, and `grid_to_pixels` takes a map on the grid
back to the original pixels.
"""

import os
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import ImagesKwargs


GEOMETRIES = ("pad", "stretch", "crop")


class Fit(NamedTuple):
    """How a picture lies on the canvas: the part of it that is shown, and where.

    Attributes:
        source: (left, top, right, bottom) in pixels of the picture, fractions allowed.
        target: (left, top, right, bottom) in whole pixels of the canvas.
    """

    source: tuple[float, float, float, float]
    target: tuple[int, int, int, int]


def fit(picture: tuple[int, int], canvas: tuple[int, int], geometry: str) -> Fit:
    """The fit of a picture of (height, width) onto a canvas of (height, width).

    Raises:
        ValueError: an unknown geometry.
    """
    (height, width), (canvas_height, canvas_width) = picture, canvas
    everything = (0.0, 0.0, float(width), float(height))
    if geometry == "stretch":
        return Fit(everything, (0, 0, canvas_width, canvas_height))
    if geometry == "pad":
        scale = min(canvas_height / height, canvas_width / width)
        shown_height = max(1, min(canvas_height, round(height * scale)))
        shown_width = max(1, min(canvas_width, round(width * scale)))
        left, top = (canvas_width - shown_width) // 2, (canvas_height - shown_height) // 2
        return Fit(everything, (left, top, left + shown_width, top + shown_height))
    if geometry == "crop":
        scale = max(canvas_height / height, canvas_width / width)
        shown_height, shown_width = min(height, canvas_height / scale), min(width, canvas_width / scale)
        left, top = (width - shown_width) / 2, (height - shown_height) / 2
        return Fit((left, top, left + shown_width, top + shown_height), (0, 0, canvas_width, canvas_height))
    raise ValueError(f"`geometry` must be one of {', '.join(GEOMETRIES)}, got '{geometry}'.")


def covered(
    cells: int, cell_size: int, source: tuple[float, float], target: tuple[int, int], length: int
) -> np.ndarray:
    """Along one axis, the share of every cell that every pixel of the picture fills: float32 `(cells, length)`.

    Exact lengths, because a box filter may lose a pixel whose centre lies on the border of two of its windows.

    Args:
        source, target: the axis of a `Fit`, as (start, end).
        length: pixels of the picture.
    """
    scale = (source[1] - source[0]) / (target[1] - target[0])
    edges = (np.arange(cells + 1) * cell_size - target[0]) * scale + source[0]
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) / (cell_size * scale)).astype(np.float32)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB: turned upright, 16 bits scaled to 8, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class AgeVlmImageProcessorKwargs(ImagesKwargs, total=False):
    """
    geometry (`str`): `pad`, `stretch` or `crop`.
    cell_size (`int`): pixels of the canvas per visual cell; 32 for a four-stage ConvNeXt.
    max_pixels (`int`): pictures with more pixels are refused (decompression bombs).
    """

    geometry: Literal["pad", "stretch", "crop"]
    cell_size: int
    max_pixels: int


class AgeVlmImageProcessor(PilBackend):
    """Pictures to `pixel_values (n, 3, height, width)` float32 and `visual_token_mask (n, cells)` bool."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 768, "width": 768}  # noqa: RUF012 - the attribute transformers reads
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    geometry = "pad"
    cell_size = 32
    max_pixels = 89_478_485
    valid_kwargs = AgeVlmImageProcessorKwargs
    model_input_names = ["pixel_values", "visual_token_mask"]  # noqa: RUF012

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of visual cells."""
        return self.size["height"] // self.cell_size, self.size["width"] // self.cell_size

    @property
    def _canvas(self) -> tuple[int, int]:
        return self.size["height"], self.size["width"]

    def fetch_images(self, image_url_or_urls):
        """Local files are opened as they are: the base class would lay transparency on black and cut 16 bits off.

        Raises:
            ValueError: a file that is no picture.
        """
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            try:
                return Image.open(image_url_or_urls)
            except (OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"{image_url_or_urls} cannot be opened: {error}. Replace the file.") from error
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, max_pixels: int, do_rescale: bool, input_data_format=None, **kwargs) -> Image.Image:
        """Any picture (Pillow, NumPy, torch) as an RGB Pillow picture.

        Raises:
            ValueError: no pixels or more than `max_pixels`, a file that cannot be read to its end, or a floating-point
                array with `do_rescale=False`.
        """
        if not isinstance(image, Image.Image):
            pixels = np.moveaxis(
                super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format), 0, -1
            )
            if pixels.dtype != np.uint8:
                if not do_rescale:
                    raise ValueError(
                        f"A picture of {pixels.dtype} with `do_rescale=False`. Leave `do_rescale` on: floating-point "
                        "pictures are brought to 0..255 first, because pictures are resized in 8 bits."
                    )
                scale = 255 if pixels.max(initial=0) <= 1 else 1
                pixels = (pixels * scale).round().clip(0, 255).astype(np.uint8)
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        if not image.width * image.height:
            raise ValueError(f"A picture of {image.width} x {image.height} pixels has none. Drop it.")
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"A picture of {image.width} x {image.height} pixels is over the limit of {max_pixels:,} pixels. "
                "Scale it down, or raise `max_pixels` if you trust where it comes from."
            )
        try:
            return to_rgb(image)
        except (OSError, SyntaxError) as error:
            name = getattr(image, "filename", "") or "A picture"
            raise ValueError(f"{name} cannot be decoded: {error}. Replace the file or drop the row.") from error

    def _preprocess(
        self,
        images: list[Image.Image],
        size,
        geometry: str,
        cell_size: int,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        height, width = size["height"], size["width"]
        if height % cell_size or width % cell_size:
            raise ValueError(f"`size` {height} x {width} is no multiple of the cell size {cell_size} (`cell_size`).")
        background = [int(value * 255) for value in image_mean]
        canvases = np.empty((len(images), height, width, 3), dtype=np.uint8)
        visible = np.zeros((len(images), height // cell_size, width // cell_size), dtype=bool)
        for canvas, cells, image in zip(canvases, visible, images, strict=True):
            source, (left, top, right, bottom) = fit((image.height, image.width), (height, width), geometry)
            if source != (0, 0, right - left, bottom - top):
                image = image.resize((right - left, bottom - top), resample, box=source)
            canvas[:] = background
            canvas[top:bottom, left:right] = np.asarray(image)
            cells[top // cell_size : -(-bottom // cell_size), left // cell_size : -(-right // cell_size)] = True
        # One multiplication and one addition for rescaling and normalising together.
        scale = np.full(3, rescale_factor if do_rescale else 1.0)
        shift = np.zeros(3)
        if do_normalize:
            scale, shift = scale / np.asarray(image_std), -np.asarray(image_mean) / np.asarray(image_std)
        pixels = canvases.transpose(0, 3, 1, 2).astype(np.float32, order="C")
        pixels *= scale.astype(np.float32)[:, None, None]
        pixels += shift.astype(np.float32)[:, None, None]
        data = {"pixel_values": pixels, "visual_token_mask": visible.reshape(len(images), -1)}
        return BatchFeature(data, tensor_type=return_tensors)

    def mask_to_grid(self, mask: Image.Image | np.ndarray) -> np.ndarray:
        """The cells of the grid that a mask of the original picture covers (M' of Eq. 3).

        Args:
            mask: non-zero where the object is; Pillow picture or array `(height, width)`.

        Returns:
            bool `(rows, columns)`: cells covered by half or more; where there is none, the cell with the largest
            overlap, so that a small object never vanishes. All False if `crop` cut the whole object away.

        Raises:
            ValueError: the mask is empty, or has channels.
        """
        mask = np.asarray(mask) != 0
        if mask.ndim != 2:
            raise ValueError(f"A mask has the shape (height, width), got {mask.shape}. Take one channel of it.")
        if not mask.any():
            raise ValueError("The mask is empty: it marks no pixel. Drop it, or leave the row unguided.")
        source, target = fit(mask.shape, self._canvas, self.geometry)
        rows, columns = (
            covered(cells, self.cell_size, source[axis::2], target[axis::2], mask.shape[1 - axis])
            for axis, cells in ((1, self.grid[0]), (0, self.grid[1]))
        )
        coverage = rows @ mask.astype(np.float32) @ columns.T
        cells = coverage >= 0.5 - 1e-6  # float32 sums that should be one half may be a little less
        if not cells.any() and coverage.max() > 1e-12:  # below: the rounding of the crop's border
            cells.flat[coverage.argmax()] = True
        return cells

    def grid_to_pixels(self, values: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """A map on the grid, in the pixels of the original picture.

        Args:
            values: floating point `(rows, columns)`.
            original_size: (height, width) of the picture.

        Returns:
            float32 `(height, width)`, interpolated bilinearly; 0 where `crop` cut the picture away.
        """
        height, width = original_size
        source, target = fit(original_size, self._canvas, self.geometry)
        canvas = Image.fromarray(np.asarray(values, dtype=np.float32)).resize(
            self._canvas[::-1], Image.Resampling.BILINEAR
        )
        left, top = round(source[0]), round(source[1])
        right, bottom = max(left + 1, round(source[2])), max(top + 1, round(source[3]))
        shown = canvas.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=target)
        pixels = np.zeros((height, width), dtype=np.float32)
        pixels[top:bottom, left:right] = np.asarray(shown)
        return pixels


AgeVlmImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["AgeVlmImageProcessor"]
