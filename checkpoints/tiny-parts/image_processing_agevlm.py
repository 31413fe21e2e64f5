"""Image processing of AGE-VLM: one geometry for pictures, masks and attention maps (paper section 3.2.2, appendix C).

A picture is fitted onto a square canvas (768 pixels, a grid of 24 x 24 visual cells) in one of three ways:
- `pad` (default): the whole picture, centered on CLIP's mean color. Cells that show no picture are reported in
  `visual_token_mask`, so that the model never attends to them. The paper leaves its own policy open and blames
  unmasked padding for stray attention.
- `stretch`: the whole picture, aspect ratio given up.
- `crop`: the center, filling the canvas.

`mask_to_grid` takes a mask of the original picture through the same fit, and `grid_to_pixels` takes a map on the grid
back to the original pixels.

There are two backends, as everywhere in transformers: `AgeVlmImageProcessor` (torchvision, in batches and on any
device) and `AgeVlmImageProcessorPil` (Pillow and NumPy). They decode alike and resize alike, to within one step of
1 / 255 (of pure noise, one value in ten million differs by two). Both save the same files; who loads them through the
Auto classes gets the first where torchvision is installed, else the second.
"""

import base64
import io
import os
import urllib.request
from typing import Any, Literal, NamedTuple

from .compatibility_agevlm import MINIMUM  # noqa: F401 - says which transformers is needed


# isort: split
import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import requires_backends


GEOMETRIES = ("pad", "stretch", "crop")
# The filters that Pillow and torchvision implement alike.
FILTERS = (PILImageResampling.BILINEAR, PILImageResampling.BICUBIC)
# Pillow reads more, among it PostScript, for which it starts a program.
Image.init()
FORMATS = [
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
]
# Where Pillow looks for the orientation, besides the tags of a TIFF
METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# What makes a picture upright, by the orientation of its EXIF block.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACKENDS = {
    "torchvision": "image_processing_agevlm.AgeVlmImageProcessor",
    "pil": "image_processing_agevlm.AgeVlmImageProcessorPil",
}


class Fit(NamedTuple):
    """How a picture lies on the canvas: the part of it that is shown, and where.

    Attributes:
        source: (left, top, right, bottom) in pixels of the picture.
        target: (left, top, right, bottom) in pixels of the canvas.
    """

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]


def fit(picture: tuple[int, int], canvas: tuple[int, int], geometry: str) -> Fit:
    """The fit of a picture of (height, width) onto a canvas of (height, width).

    Raises:
        ValueError: an unknown geometry.
    """
    (height, width), (canvas_height, canvas_width) = picture, canvas
    everything = (0, 0, width, height)
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
        shown_height = max(1, min(height, round(canvas_height / scale)))
        shown_width = max(1, min(width, round(canvas_width / scale)))
        left, top = (width - shown_width) // 2, (height - shown_height) // 2
        return Fit((left, top, left + shown_width, top + shown_height), (0, 0, canvas_width, canvas_height))
    raise ValueError(f"`geometry` must be one of {', '.join(GEOMETRIES)}, got '{geometry}'.")


def covered(cells: int, cell_size: int, source: tuple[int, int], target: tuple[int, int], length: int) -> np.ndarray:
    """Along one axis, the share of every cell that every pixel of the picture fills: float32 `(cells, length)`.

    Exact lengths, because a box filter may lose a pixel whose center lies on the border of two of its windows.

    Args:
        source, target: the axis of a `Fit`, as (start, end).
        length: pixels of the picture.
    """
    scale = (source[1] - source[0]) / (target[1] - target[0])
    edges = (np.arange(cells + 1) * cell_size - target[0]) * scale + source[0]
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) / (cell_size * scale)).astype(np.float32)


def orientation(image: Image.Image) -> int:
    """The orientation in a picture's metadata, 1 (upright) to 8; 1 where there are none that can be read."""
    image.load()
    if image.format != "TIFF" and not any(name in image.info for name in METADATA):
        return 1
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises nearly anything here
        return 1


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its metadata say; itself where they ask for nothing."""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB: turned upright, 16 bits scaled to 8, transparency laid on white.

    Raises:
        ValueError: gray of more than 16 bits.
    """
    image = upright(image)
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"values from {gray.min()} to {gray.max()}, expected 0 to 65535")
        return Image.fromarray((gray >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image), do_rescale=True)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def checked_fit(picture: tuple[int, int], canvas: tuple[int, int], geometry: str, do_resize: bool) -> Fit:
    """The fit, where it needs no resampling or that is allowed.

    Raises:
        ValueError: an unknown geometry, or a picture that would have to be resized with `do_resize=False`.
    """
    fitted = fit(picture, canvas, geometry)
    (x0, y0, x1, y1), (left, top, right, bottom) = fitted
    if not do_resize and (y1 - y0, x1 - x0) != (bottom - top, right - left):
        raise ValueError(
            f"A picture of {picture[1]} x {picture[0]} pixels must be resized for `size` {canvas[1]} x {canvas[0]}, "
            "but `do_resize` is off. Leave it on, or give pictures of that size."
        )
    return fitted


def first_pass(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(height, width) between the two passes of a resampling.

    The order matters where a filter overshoots 0..255, so both backends take it from here: columns first, unless that
    would make a tall picture wide as well.
    """
    (height, width), (target_height, target_width) = size, target
    return (target_height, width) if target_height < height and target_width > width else (height, target_width)


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Before anything is decoded.

    Raises:
        ValueError: no pixels, or more than `max_pixels`.
    """
    if not width * height:
        raise ValueError(f"A picture of {width} x {height} pixels has none. Drop it.")
    if width * height > max_pixels:
        raise ValueError(
            f"A picture of {width} x {height} pixels is over the limit of {max_pixels:,} pixels. Scale it down, or "
            "raise `max_pixels` if you trust where it comes from."
        )


def check_numbers(name: str, values: Any, least: float) -> None:
    """
    Raises:
        ValueError: `values` are not three finite numbers of at least `least`.
    """
    numbers = np.asarray(values)
    usable = numbers.shape == (3,) and numbers.dtype.kind in "fiu"
    if not usable or not (np.isfinite(numbers) & (numbers >= least)).all():
        raise ValueError(f"`{name}` must be three finite numbers of at least {least:g}, got {values!r}.")


def background(image_mean) -> list[int]:
    """The color of the padding, in 8 bits."""
    return [int(value * 255) for value in image_mean]


def scale_and_shift(factor: float, do_normalize: bool, image_mean, image_std) -> tuple[np.ndarray, np.ndarray]:
    """Rescaling and normalizing as one multiplication and one addition: float32 `(3, 1, 1)` each."""
    scale, shift = np.full(3, factor), np.zeros(3)
    if do_normalize:
        scale, shift = scale / np.asarray(image_std), -np.asarray(image_mean) / np.asarray(image_std)
    return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]


def visible_cells(fits: list[Fit], canvas: tuple[int, int], cell_size: int) -> np.ndarray:
    """Which cells show a part of the picture: bool `(n, cells)`."""
    visible = np.zeros((len(fits), canvas[0] // cell_size, canvas[1] // cell_size), dtype=bool)
    for cells, (_, (left, top, right, bottom)) in zip(visible, fits, strict=True):
        cells[top // cell_size : -(-bottom // cell_size), left // cell_size : -(-right // cell_size)] = True
    return visible.reshape(len(fits), -1)


def _to_bytes(pixels: np.ndarray, do_rescale: bool) -> np.ndarray:
    """Pixels of any type as uint8: 0..1 or 0..255 in floating point, 0..255 in integers, 0..65535 in 16 bits.

    Raises:
        ValueError: values outside of that, or floating point with `do_rescale=False`.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    floating = np.issubdtype(pixels.dtype, np.floating)
    if floating and not do_rescale:
        raise ValueError(
            f"A picture of {pixels.dtype} with `do_rescale=False`. Leave `do_rescale` on: floating-point pictures are "
            "brought to 0..255 first, because pictures are resized in 8 bits."
        )
    low, high = (pixels.min(), pixels.max()) if pixels.size else (0, 0)
    if not 0 <= low <= high <= 255:  # refuses NaN too
        raise ValueError(
            f"A picture of {pixels.dtype} with values from {low} to {high}. Give 0..255, or 0..1 in floating point: "
            "pictures are normalized here, not before."
        )
    return (pixels * (255 if floating and high <= 1 else 1)).round().astype(np.uint8)


class AgeVlmImageProcessorKwargs(ImagesKwargs, total=False):
    """
    geometry (`str`): `pad`, `stretch` or `crop`.
    cell_size (`int`): pixels of the canvas per visual cell; 32 for a four-stage ConvNeXt.
    max_pixels (`int`): pictures with more pixels are refused (decompression bombs).
    """

    geometry: Literal["pad", "stretch", "crop"]
    cell_size: int
    max_pixels: int


class AgeVlmImageProcessorMixin:
    """What both backends share: settings, decoding, refusals, saving, and the geometry of masks and maps."""

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

    def to_dict(self) -> dict[str, Any]:
        # The same for both backends, so that which of them saved a checkpoint decides nothing.
        # And what a loaded file says of other code does not travel on.
        auto_map = {"AutoImageProcessor": dict(BACKENDS)}
        return {**super().to_dict(), "image_processor_type": "AgeVlmImageProcessor", "auto_map": auto_map}

    def fetch_images(self, image_url_or_urls):
        """Opens files, URLs and base64 strings with Pillow, nested lists included; pictures pass.

        Opened, not decoded: the base classes would decode before `max_pixels` is asked, lay transparency on black and
        cut 16 bits off, and torchvision's would know fewer formats.

        Raises:
            ValueError: what is no picture, or cannot be fetched.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if not isinstance(image_url_or_urls, str):
            return super().fetch_images(image_url_or_urls)
        source = image_url_or_urls
        try:
            if source.startswith(("http://", "https://")):
                most = 4 * self.max_pixels + 2**20  # bytes; four for each pixel that is allowed, and metadata
                with urllib.request.urlopen(source, timeout=60) as reply:
                    content = reply.read(most + 1)
                if len(content) > most:
                    raise ValueError(f"its file has more than {most:,} bytes")
                return Image.open(io.BytesIO(content), formats=FORMATS)
            if os.path.isfile(source):
                return Image.open(source, formats=FORMATS)
            _, _, encoded = source.rpartition(",")  # of a data URL; base64 itself has no comma
            return Image.open(io.BytesIO(base64.b64decode(encoded)), formats=FORMATS)
        except Exception as error:  # Pillow and its plugins raise nearly anything
            name = source if len(source) < 300 else f"{source[:60]}..."
            raise ValueError(
                f"{name} cannot be opened: {error}. Replace the file; paths, URLs and base64 are understood."
            ) from error

    def _validate_preprocess_kwargs(self, **kwargs):
        """What this processor cannot do is refused here, because the base class would pass it over in silence.

        Raises:
            ValueError: a `size` without height and width or no multiple of `cell_size`, a filter that the backends
                do not share, a mean or deviation that is not three usable numbers, or a step that the geometry stands
                for.
        """
        size, cell_size = kwargs["size"], kwargs["cell_size"]
        if not (isinstance(cell_size, int) and cell_size > 0):
            raise ValueError(f"`cell_size` must be a positive number of pixels, got {cell_size!r}.")
        if not (size.height and size.width):
            raise ValueError(f"`size` must have `height` and `width`, got {dict(size)}.")
        if size.height % cell_size or size.width % cell_size:
            raise ValueError(
                f"`size` {size.height} x {size.width} is no multiple of the cell size {cell_size} (`cell_size`)."
            )
        if kwargs["resample"] not in FILTERS:
            names = " or ".join(f"{resample.value} ({resample.name.lower()})" for resample in FILTERS)
            raise ValueError(f"`resample` must be {names}, got {kwargs['resample']!r}.")
        # The padding is of the mean's color.
        check_numbers("image_mean", kwargs["image_mean"], least=0.0)
        if kwargs["do_normalize"]:
            check_numbers("image_std", kwargs["image_std"], least=1e-6)
        for name in ("do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` is not a step of this processor. Choose a `geometry` (pad, crop) instead.")
        super()._validate_preprocess_kwargs(**kwargs)

    def _to_picture(
        self, image, max_pixels: int, do_rescale: bool, do_convert_rgb: bool, input_data_format=None
    ) -> Image.Image:
        """Any picture (Pillow, NumPy, torch) as an RGB Pillow picture.

        Raises:
            ValueError: no pixels or more than `max_pixels`, a file that cannot be read to its end, values out of
                range, a floating-point array with `do_rescale=False`, or not RGB with `do_convert_rgb=False`.
        """
        if not isinstance(image, Image.Image):
            if isinstance(image, torch.Tensor):
                image = image.cpu()  # the base class knows host memory only
            pixels = PilBackend.process_image(self, image, do_convert_rgb=False, input_data_format=input_data_format)
            pixels = _to_bytes(np.moveaxis(pixels, 0, -1), do_rescale)
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        check_pixels(image.height, image.width, max_pixels)
        if not do_convert_rgb and image.mode != "RGB":
            raise ValueError(
                f"A picture of mode {image.mode} with `do_convert_rgb=False`. Leave `do_convert_rgb` on: the model "
                "reads RGB."
            )
        try:
            return to_rgb(image)
        except Exception as error:  # Pillow and its plugins raise nearly anything
            name = getattr(image, "filename", "") or "A picture"
            raise ValueError(f"{name} cannot be decoded: {error}. Replace the file or drop the row.") from error

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
        if isinstance(mask, Image.Image):
            mask = upright(mask)  # as its picture
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
        left, top, right, bottom = source
        shown = canvas.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=target)
        pixels = np.zeros((height, width), dtype=np.float32)
        pixels[top:bottom, left:right] = np.asarray(shown)
        return pixels


class AgeVlmImageProcessorPil(AgeVlmImageProcessorMixin, PilBackend):
    """Pictures to `pixel_values (n, 3, height, width)` and `visual_token_mask (n, cells)` bool, by Pillow.

    Pixels are float32, or with neither `do_rescale` nor `do_normalize` the uint8 they were resized in.
    """

    def process_image(self, image, max_pixels, do_rescale, do_convert_rgb, input_data_format=None, **kwargs):
        """An RGB Pillow picture, on which Pillow's resampling works without a copy."""
        return self._to_picture(image, max_pixels, do_rescale, do_convert_rgb, input_data_format)

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
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
        canvas = (size.height, size.width)
        fits = [checked_fit((image.height, image.width), canvas, geometry, do_resize) for image in images]
        canvases = np.empty((len(images), *canvas, 3), dtype=np.uint8)
        for pixels, image, (source, (left, top, right, bottom)) in zip(canvases, images, fits, strict=True):
            if source != (0, 0, image.width, image.height):
                image = image.crop(source)
            target = (bottom - top, right - left)
            # Two calls, because Pillow's own order changes with size and version.
            for height, width in (first_pass((image.height, image.width), target), target):
                image = image.resize((width, height), resample)
            if target != canvas:
                pixels[:] = background(image_mean)
            pixels[top:bottom, left:right] = np.asarray(image)
        values = canvases.transpose(0, 3, 1, 2)
        if do_rescale or do_normalize:
            scale, shift = scale_and_shift(rescale_factor if do_rescale else 1.0, do_normalize, image_mean, image_std)
            values = values.astype(np.float32, order="C")
            values *= scale
            values += shift
        data = {"pixel_values": values, "visual_token_mask": visible_cells(fits, canvas, cell_size)}
        return BatchFeature(data, tensor_type=return_tensors)


class AgeVlmImageProcessor(AgeVlmImageProcessorMixin, TorchvisionBackend):
    """Pictures to `pixel_values (n, 3, height, width)` and `visual_token_mask (n, cells)` bool: torchvision.

    Pixels are of the same type as in [`AgeVlmImageProcessorPil`].

    Raises:
        ImportError: torchvision is not installed. [`AgeVlmImageProcessorPil`] does without.
    """

    def __init__(self, **kwargs):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def process_image(
        self, image, max_pixels, do_rescale, do_convert_rgb, input_data_format=None, device=None, **kwargs
    ) -> torch.Tensor:
        """An RGB tensor `(3, height, width)` uint8 on `device`: such tensors pass, all else is decoded by Pillow."""
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
            pixels = super().process_image(
                image, do_convert_rgb=False, input_data_format=input_data_format, device=device
            )
            if pixels.shape[0] == 3:
                check_pixels(*pixels.shape[1:], max_pixels)
                return pixels
        picture = self._to_picture(image, max_pixels, do_rescale, do_convert_rgb, input_data_format)
        # Left in the order of the channels that Pillow has: the resampling kernels are fastest with it.
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device)

    def resize(self, image: torch.Tensor, size: SizeDict, resample=None, **kwargs) -> torch.Tensor:
        """`(n, 3, height, width)` uint8 to `size`, one axis after the other, 8 bits in between, as in Pillow.

        The first pass is computed in floating point: torch's 8-bit kernels have weights of 16 bits and, rounded twice,
        end two steps from Pillow (22 bits) now and then; and accelerators keep what overshoots 0..255 on the way.
        """

        def to_width(image: torch.Tensor, width: int) -> torch.Tensor:
            size = SizeDict(height=image.shape[-2], width=width)
            image = super(AgeVlmImageProcessor, self).resize(image.float().contiguous(), size, resample)
            return image.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)

        if first_pass(tuple(image.shape[-2:]), (size.height, size.width))[0] != image.shape[-2]:
            # Rows first, turned: torch's kernels are wrong for the rows of a single column.
            return to_width(to_width(image.mT, size.height).mT, size.width)
        if size.width != image.shape[-1]:
            image = to_width(image, size.width)
        return super().resize(image, size, resample)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        geometry: str,
        cell_size: int,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        disable_grouping: bool | None = None,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        canvas = (size.height, size.width)
        fits = [checked_fit(tuple(image.shape[1:]), canvas, geometry, do_resize) for image in images]
        groups, places = group_images_by_shape(images, disable_grouping=disable_grouping)
        members: dict[Any, list[int]] = {}
        for index, (group, _) in places.items():
            members.setdefault(group, []).append(index)
        device = images[0].device
        dtype = torch.float32 if do_rescale or do_normalize else torch.uint8
        values = torch.empty((len(images), 3, *canvas), dtype=dtype, device=device)
        color = torch.tensor(background(image_mean), dtype=dtype, device=device)[:, None, None]
        for group, pixels in groups.items():
            (x0, y0, x1, y1), (left, top, right, bottom) = fits[members[group][0]]
            pixels = self.resize(
                pixels[..., y0:y1, x0:x1], SizeDict(height=bottom - top, width=right - left), resample
            )
            for index, picture in zip(members[group], pixels, strict=True):
                if pixels.shape[-2:] != canvas:
                    values[index] = color
                values[index, :, top:bottom, left:right] = picture
        if do_rescale or do_normalize:
            scale, shift = scale_and_shift(rescale_factor if do_rescale else 1.0, do_normalize, image_mean, image_std)
            values.mul_(torch.from_numpy(scale).to(device)).add_(torch.from_numpy(shift).to(device))
        visible = torch.from_numpy(visible_cells(fits, canvas, cell_size)).to(device)
        return BatchFeature({"pixel_values": values, "visual_token_mask": visible}, tensor_type=return_tensors)


AgeVlmImageProcessor.register_for_auto_class("AutoImageProcessor")
AgeVlmImageProcessorPil.register_for_auto_class("AutoImageProcessor")

__all__ = ["AgeVlmImageProcessor", "AgeVlmImageProcessorPil"]
