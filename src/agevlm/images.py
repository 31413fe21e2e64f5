"""Pictures and masks: the one place that opens, converts and saves them, outside of the processor that travels."""

import base64
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from agevlm.store import replacing


MAX_PIXELS = 64_000_000
# Pillow reads more, among it PostScript, for which it starts a program. The traveling processor has the same list.
Image.init()
FORMATS: list[str] = [
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in Image.OPEN
]
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
FIX = "replace the picture or drop the row"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION, _BITS, _SAMPLES = 0x0112, 258, 339  # tags of EXIF and TIFF
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for the orientation
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_CLASSES = 32  # values below this beside 255 are taken for class numbers and their border, not for soft edges
_GRAYS = 64  # what the channels of a gray picture may differ by, as JPEG stores it


def open_image(image: Any, where: str, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture completely and converts it.

    Transparent pixels become white, the EXIF rotation is applied, gray of more than 8 bits is scaled from the range of
    its file. With `mode="1"` the picture is a mask: [`read_mask`].

    Args:
        image: a PIL picture, a path, bytes, or the {"bytes", "path"} of an undecoded `datasets.Image`.
        where: begins every message.
        mode: `RGB`, `RGBA` (transparency stays) or `1`.

    Raises:
        ValueError: a broken, truncated, empty or oversized picture, anything else that is no picture, or a mask whose
            values do not tell the object from the rest.
    """
    stored = open_stored(image, where, max_pixels, decode=True)
    with _decoding(where):
        upright, white = _upright(stored), _white(stored)
    if mode == "1":
        found = read_mask(upright, where, white)
    elif upright.mode == mode and "transparency" not in upright.info:
        found = upright
    else:
        found = _convert(upright, mode, white, where)
    return found.copy() if found is image else found


def open_mask(image: Any, where: str, size: tuple[int, int]) -> Image.Image:
    """The mask of a picture of `size` (width, height). Raises ValueError as `open_image` does, or for another size."""
    mask = open_image(image, where, mode="1")
    if mask.size != size:
        told = f"{where} is {mask.width} x {mask.height} but the picture is {size[0]} x {size[1]}"
        raise ValueError(f"{told}; store the mask at the picture's size")
    return mask


def open_header(image: Any, where: str) -> Image.Image:
    """The picture with its upright size; its pixels are decoded only where it must be turned. Raises ValueError as
    `open_image` does."""
    stored = open_stored(image, where)
    return stored if _turn(stored) is None else open_image(image, where)


def open_stored(image: Any, where: str, max_pixels: int = MAX_PIXELS, decode: bool = False) -> Image.Image:
    """The picture in the mode of its file, not turned. Raises ValueError as `open_image` does."""
    source = _source(image)
    if isinstance(image, Mapping) and source == b"" and image.get("path"):
        raise ValueError(
            f"{where}: there are no bytes of the picture, and its name {image['path']!r} is not opened; store "
            "its bytes in the row"
        )
    if isinstance(source, Image.Image):
        return _checked(source, where, max_pixels, decode)
    if not isinstance(source, (bytes, bytearray, memoryview, str, Path)):
        raise ValueError(f"{where}: expected a picture, got {type(source).__name__}; {FIX}")
    try:
        with _decoding(where):
            opened = Image.open(_file(source), formats=FORMATS)
        return _checked(opened, where, max_pixels, decode)
    except ValueError as error:
        if not isinstance(error.__cause__, ValueError):  # which Pillow raises for large profiles and texts of a PNG
            raise
    with _decoding(where):
        data = Path(source).read_bytes() if isinstance(source, (str, Path)) else bytes(source)
        opened = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    return _checked(opened, where, max_pixels, decode)


def stored_bytes(image: Any) -> bytes:
    """What decides a stored picture or mask: the bytes of its file, whatever its name; its pixels where it is opened.

    Args:
        image: as `open_image` takes it, or None.
    """
    source = _source(image)
    if isinstance(source, Image.Image):
        return repr((source.mode, source.size)).encode() + source.tobytes()
    if isinstance(image, Mapping) and source == b"":
        return str(image.get("path") or "").encode()
    if isinstance(source, (str, Path)):
        return Path(source).read_bytes() if os.path.isfile(source) else str(source).encode()
    return b"" if source is None else bytes(source)


def _source(image: Any) -> Any:
    """What is opened of a picture: its bytes, even empty ones (`data/rows.refuse_names`), else its path."""
    if not isinstance(image, Mapping):
        return image
    return image.get("path") if image.get("bytes") is None else image["bytes"]


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Turns whatever Pillow and its plugins raise into a ValueError that names the place."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our limit of pixels is stricter; damaged metadata does not matter
            yield
    except Exception as error:
        reason = "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{where}: the picture cannot be decoded ({reason}); {FIX}") from error


def _file(source: Any) -> Any:
    if not isinstance(source, (str, Path)):
        return io.BytesIO(source)
    if os.path.exists(source) and not os.path.isfile(source):
        raise OSError(f"{source} is not a regular file")
    return source


def _checked(image: Image.Image, where: str, max_pixels: int, decode: bool) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{where}: {width} x {height} pixels exceed the limit of {max_pixels}; shrink the picture")
    if width == 0 or height == 0:
        raise ValueError(f"{where}: the picture is empty ({width} x {height}); drop the row")
    if decode:
        with _decoding(where):
            image.load()
    return image


def _without_texts(data: bytes) -> bytes:
    """A PNG without its color profile and texts. Raises ValueError for anything else."""
    if not data.startswith(b"\x89PNG"):
        raise ValueError("a part of the file cannot be read")
    kept, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"iCCP", b"iTXt", b"tEXt", b"zTXt"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright. Metadata that cannot be read ask for nothing."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises nearly anything here
        return None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned, without the metadata that would turn it again. The given one stays as it is."""
    turn = _turn(image)
    turned = image if turn is None else image.transpose(turn)
    if any(name in turned.info for name in _METADATA):
        turned = turned.copy() if turned is image else turned
        for name in _METADATA:
            turned.info.pop(name, None)
    return turned


def _white(image: Image.Image) -> int:
    """The largest value that a gray picture of more than 8 bits may hold; 0 where its file does not tell."""
    tags = getattr(image, "tag_v2", {})
    bits, kind = (tags.get(tag, (default,))[0] for tag, default in ((_BITS, 16), (_SAMPLES, 1)))
    return 2 ** (bits - (kind == 2)) - 1 if bits <= 16 else 0


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _to_8_bits(image: Image.Image, white: int, where: str) -> Image.Image:
    """Gray of any depth as `L`, or `LA` where one value is transparent. Raises ValueError for values outside of the
    range: 0 to `white`; in floating point 0 to 1, or 0 to 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    floating = image.mode == "F"
    white = (1 if high <= 1 else 255) if floating else white
    if not 0 <= low <= high <= white:  # refuses NaN too
        expected = f"0 to {white}" if white else "8 or 16 bits"
        raise ValueError(f"{where}: a gray picture with values from {low} to {high}, expected {expected}; scale it")
    levels = (values * (255 / white)).round() if floating else values.astype(np.int64) * 256 // (white + 1)
    gray = Image.fromarray(levels.astype(np.uint8))
    if "transparency" not in image.info:
        return gray
    visible = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (gray, Image.fromarray(visible)))


def _convert(image: Image.Image, mode: str, white: int, where: str) -> Image.Image:
    if _is_deep(image):
        image = _to_8_bits(image, white, where)
    with _decoding(where):
        if mode == "RGB" and _has_alpha(image):
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
        return image.convert(mode)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA or "transparency" in image.info


def read_mask(image: Image.Image, where: str, white: int = 65535) -> Image.Image:
    """A mask of mode `1`, without dithering.

    Alpha decides where it is not opaque everywhere; else the brightness. Two values are background and object (the
    larger one); 0 alone is an empty mask and white alone a full one; soft edges between dark and bright are cut at one
    half, if no object is lost on the dark side.

    Args:
        white: largest value of a gray mask of more than 8 bits.

    Raises:
        ValueError: any other values, such as class numbers, or several colors.
    """
    if _has_alpha(image):
        with _decoding(where):
            alpha = (_to_8_bits(image, white, where) if _is_deep(image) else image.convert("RGBA")).getchannel("A")
        if alpha.getextrema() != (255, 255):
            return _two_levels(np.asarray(alpha), 255, where)
    if image.mode == "1":
        return image
    if _is_deep(image):
        values = np.asarray(image)
        return _two_levels(values, (1 if values.max() <= 1 else 255) if image.mode == "F" else white, where)
    with _decoding(where):
        gray = np.asarray(image.convert("L"))
        one_color = image.getcolors(1) is not None
        levels = np.asarray(image.convert("RGB"), dtype=np.int16)
    if image.mode != "L" and image.getcolors(2) is None and np.ptp(levels, axis=2).max() > _GRAYS:
        raise ValueError(
            f"{where}: the mask has several colors, as photographs and classes have; store the object as 255, the "
            "rest as 0, or numbers of classes with a palette"
        )
    if gray.min() == gray.max() and not one_color:
        if image.mode != "P":
            raise ValueError(f"{where}: the mask has colors of one brightness; store the object as 255, the rest as 0")
        gray = np.asarray(image)  # the palette does not tell the indices apart
    return _two_levels(gray, 255, where)


def read_classes(image: Any, where: str) -> Image.Image:
    """A mask as [`open_image`] reads it, or of numbers of classes or objects: all but 0 (background) and 255 (border).

    A palette counts by its numbers, not by its colors. Several gray values, one of 32 or more, that fill areas are
    objects, 255 too. Raises ValueError as `open_image` does.
    """
    stored = open_stored(image, where, decode=True)
    if stored.mode in ("P", "L", "I;16", "I") and not _has_alpha(stored):
        values = np.asarray(stored)
        numbers = [number for number in np.unique(values) if number not in (0, 255)]
        if numbers and (stored.mode == "P" or (len(numbers) > 1 and max(numbers) < _CLASSES)):
            return Image.fromarray((values != 0) & (values != 255))
        if numbers and max(numbers) >= _CLASSES and not values.all() and len(_areas(values) - {0}) > 1:
            return Image.fromarray(values != 0)
    return open_image(image, where, mode="1")


def _areas(values: np.ndarray) -> set[float]:
    """Which of a few values fill areas: a quarter of their pixels, or more, lie among their like. Edges and noise do
    not, nor do the many values of photographs."""
    found, counts = np.unique(values, return_counts=True)
    if len(found) > _CLASSES:
        return set()
    like = values[1:-1, 1:-1]
    inside = np.ones(like.shape, dtype=bool)
    for down, right in itertools.product(range(3), repeat=2):
        inside &= values[down : down + like.shape[0], right : right + like.shape[1]] == like
    shares = [(like[inside] == value).sum() / count for value, count in zip(found, counts, strict=True)]
    return {value.item() for value, share in zip(found, shares, strict=True) if share >= 0.25}


def _two_levels(values: np.ndarray, white: int, where: str) -> Image.Image:
    if values.dtype == np.uint8:
        seen = np.zeros(256, dtype=bool)
        seen[values] = True
        found = np.flatnonzero(seen)
    else:
        found = np.unique(values)
    low, high = float(found[0]), float(found[-1])
    if len(found) == 1 and low in (0, white):
        chosen = values > 0
    elif len(found) == 2 and np.isfinite(high - low):
        chosen = values == high
    elif (
        0 <= low * 2 <= white < high * 2 <= 2 * white
        and not (high == white and found[-2] < _CLASSES)
        and not any(0 < 2 * value <= white for value in _areas(values))
    ):
        chosen = values.astype(np.float64) * 2 > white
    else:
        listed = ", ".join(f"{value:g}" for value in found[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(
            f"{where}: the mask holds the values {listed}, which do not tell the object from the rest; store the "
            "object as 255 and the rest as 0"
        )
    return Image.fromarray(chosen)


def data_address(image: Image.Image, kind: str, quality: int, side: int | None = None) -> str:
    """The picture as a `data:` URL for a page that fetches nothing.

    Args:
        kind: `jpeg` or `webp`.
        side: largest length of a side; larger pictures are shrunk.
    """
    if side is not None:
        image = image.copy()
        image.thumbnail((side, side))
    encoded = base64.b64encode(stored(image, kind, quality=quality)["bytes"])
    return f"data:image/{kind};base64,{encoded.decode('ascii')}"


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """A picture or mask as `datasets.Image` keeps it, {bytes, path}: a file of `kind`, by `options` of `Image.save`. A
    mask of mode `1` is a PNG of one bit a pixel."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def save_image(image: Image.Image, path: Path) -> None:
    """Writes the picture, whole or not at all, in the format of the file's suffix."""
    with replacing(path) as temporary:
        image.save(temporary, compress_level=4)  # of PNG: half of the default's time, and 4 % more bytes
