"""Pictures of attention: heat over a photograph, the outline of a mask, and labelled panels side by side."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps


SIDE = 448  # least length of a drawn picture's longer side: outlines and heat stay smooth on small pictures
OPACITY = (0.35, 0.65)  # of the heat's colours, coldest and hottest: cold parts stay recognisable
OUTLINE = (255, 255, 255)
_SHADE = (0, 0, 0)
_PAPER, _INK = (255, 255, 255), (28, 28, 32)
MOST_LINES = 4  # of a title; the whole text is in the JSON beside the picture
GAP = 14  # pixels between panels


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


def panels(
    rows: Sequence[Sequence[tuple[str, Image.Image]]], heading: str = "", side: int = 320, peak: float | None = None
) -> Image.Image:
    """Rows of titled pictures on white, each fitted into a square of `side` pixels, under a heading. With `peak`, the
    scale of heat that is drawn up to this many times an even spread stands below."""
    font, large = _font(15), _font(19)
    columns = max(len(row) for row in rows)
    width = GAP + columns * (side + GAP)
    head = _lines(heading, large, width - 2 * GAP)
    titles = [[_lines(title, font, side) for title, _ in row] for row in rows]
    fitted = [[ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS) for _, image in row]
              for row in rows]  # fmt: skip
    labels = [20 * max(map(len, row)) + 8 for row in titles]
    heights = [max(image.height for image in row) for row in fitted]
    top = 26 * len(head) + GAP + (6 if head else 0)
    below = 0 if peak is None else 34
    sheet = Image.new("RGB", (width, top + sum(labels) + sum(heights) + GAP * len(rows) + below), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(head):
        draw.text((GAP, 12 + 26 * index), line, fill=_INK, font=large)
    y = top
    for row_titles, images, label, height in zip(titles, fitted, labels, heights, strict=True):
        for column, (lines, image) in enumerate(zip(row_titles, images, strict=True)):
            x = GAP + column * (side + GAP)
            for index, line in enumerate(lines):  # the last line stands on the picture
                draw.text((x, y + label - 4 + 20 * (index - len(lines))), line, fill=_INK, font=font)
            sheet.paste(image, (x, y + label))
        y += label + height + GAP
    if peak is not None:
        _draw_scale(sheet, y, peak, font)
    return sheet


def _draw_scale(sheet: Image.Image, y: int, peak: float, font: ImageFont.FreeTypeFont) -> None:
    draw, x = ImageDraw.Draw(sheet), GAP
    words = ("0", f"{peak:.3g} × an even spread over the picture")
    draw.text((x, y), words[0], fill=_INK, font=font)
    x += round(font.getlength(words[0])) + 8
    length = max(40, min(180, sheet.width - x - round(font.getlength(words[1])) - GAP - 8))
    colours = (colormaps["jet"](np.linspace(0, 1, length))[None, :, :3] * 255).round().astype(np.uint8)
    sheet.paste(Image.fromarray(colours).resize((length, 12), Image.Resampling.NEAREST), (x, y + 4))
    draw.text((x + length + 8, y), words[1], fill=_INK, font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu as Matplotlib carries it: Pillow's own font has no Greek, Cyrillic or Arabic."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _lines(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, cut with an ellipsis where they would be more than `MOST_LINES`."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest:
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits]) > width:
            fits -= 1
        if fits < len(rest):
            space = rest.rfind(" ", 1, fits + 1)
            fits = space if space > 0 else fits  # a word that is too long is broken
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    if len(lines) <= MOST_LINES:
        return lines
    last = lines[MOST_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: MOST_LINES - 1], last + "…"]
