"""Pictures of attention: heat over a photograph, the outline of a mask, and labelled panels side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps


SIDE = 448  # least length of a drawn picture's longer side: outlines and heat stay smooth on small pictures
OPACITY = (0.35, 0.65)  # of the heat's colours, coldest and hottest: cold parts stay recognisable
OUTLINE = (255, 255, 255)
_SHADE = (0, 0, 0)
_PAPER, _INK = (255, 255, 255), (28, 28, 32)


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture in RGB, scaled up so that its longer side has at least `side` pixels."""
    factor = side / max(image.size)
    image = image.convert("RGB")
    if factor <= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def overlay(
    image: Image.Image, heat: np.ndarray, peak: float | None = None, mask: Image.Image | None = None
) -> Image.Image:
    """`heat (height, width)` of the picture, 0 to `peak`, in colour over the picture (enlarged).

    Args:
        peak: the value drawn as hottest; give maps that are compared the same one. Default: the map's maximum.
        mask: outlined on top.

    Raises:
        ValueError: heat that is not the picture's size or not finite.
    """
    if heat.shape != (image.height, image.width) or not np.isfinite(heat).all():
        raise ValueError(
            f"heat of shape {heat.shape} on a picture of {image.height} x {image.width}; both must have the same size "
            "and the heat must be finite"
        )
    below = enlarge(image)
    layer = heat_layer(heat, float(heat.max()) if peak is None else peak, below.size)
    drawn = Image.composite(layer.convert("RGB"), below, layer.getchannel("A"))
    return drawn if mask is None else outline(drawn, mask)


def heat_layer(heat: np.ndarray, peak: float, size: tuple[int, int]) -> Image.Image:
    """`heat (height, width)`, 0 to `peak`, in colours that let what lies below them through: RGBA of `size` (width,
    height)."""
    share = np.clip(heat / peak, 0, 1) if peak > 0 else np.zeros_like(heat)
    levels = Image.fromarray((share * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    layer = Image.fromarray((colormaps["jet"](np.asarray(levels))[..., :3] * 255).round().astype(np.uint8))
    low, high = OPACITY
    layer.putalpha(levels.point(lambda level: round(255 * low + (high - low) * level)))
    return layer


def outline(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture (enlarged) with the border of a mask of its proportions."""
    image = enlarge(image)
    inside = mask.convert("L").point(lambda value: 255 if value else 0).resize(image.size, Image.Resampling.NEAREST)
    inside = inside.filter(ImageFilter.ModeFilter(9))  # rounds the steps that enlarging leaves
    image = image.copy()
    for width, colour in ((9, _SHADE), (5, OUTLINE)):
        border = ImageChops.subtract(
            inside.filter(ImageFilter.MaxFilter(width)), inside.filter(ImageFilter.MinFilter(width))
        )
        image.paste(colour, mask=border)
    return image


def panels(rows: Sequence[Sequence[tuple[str, Image.Image]]], heading: str = "", side: int = 320) -> Image.Image:
    """Rows of titled pictures on white, each fitted into a square of `side` pixels, under a heading."""
    font, large = ImageFont.load_default(size=17), ImageFont.load_default(size=21)
    gap, label = 14, 28
    columns = max(len(row) for row in rows)
    top = 46 if heading else gap
    sheet = Image.new("RGB", (gap + columns * (side + gap), top + len(rows) * (side + label + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 12), _fit(heading, large, sheet.width - 2 * gap), fill=_INK, font=large)
    for row_index, row in enumerate(rows):
        for column, (title, image) in enumerate(row):
            x, y = gap + column * (side + gap), top + row_index * (side + label + gap)
            draw.text((x, y + 3), _fit(title, font, side), fill=_INK, font=font)
            fitted = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (x + (side - fitted.width) // 2, y + label))
    return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text on one line, cut with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
