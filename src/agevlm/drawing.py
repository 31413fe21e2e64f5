"""Pictures of attention and masks: heat over a photograph, the outline of a mask, titled pictures on a sheet, charts.

Reports, analyses, the demo, contact sheets and probes of training draw with these functions. Heat covers a picture as
far as it is looked at: where nothing is looked at, the picture keeps its own colors.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps, get_data_path
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from agevlm.store import replacing


SIDE = 448  # least length of a drawn picture's longer side: outlines and heat stay smooth on small pictures
# Perceptually uniform: equal steps of attention look equal. Without inferno's black and violet, which would darken
# what is hardly looked at or turn it violet
COLORS = ListedColormap(colormaps["inferno"](np.linspace(0.35, 1, 256)))
OPACITY = 0.8  # of the hottest color
LEAST_PEAK = 5.0  # times an even spread: attention without any focus must not glow
MOST_LINES = 4  # of a title; the whole text is in the JSON beside the picture
GAP = 14  # pixels between panels
_PAPER, _INK = (255, 255, 255), (28, 28, 32)
_SCALE_HEIGHT = 34
_PHRASES = [tuple(color) for color in colormaps["Dark2"](range(8), bytes=True)[:, :3].tolist()]  # readable on white


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture in RGB, scaled up so that its longer side has at least `side` pixels."""
    factor = side / max(image.size)
    image = image.convert("RGB")
    if factor <= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def peak_of(maps: Iterable[np.ndarray]) -> float:
    """The hottest value of densities that are drawn on one scale, at least `LEAST_PEAK`."""
    return max([LEAST_PEAK, *(float(heat.max()) for heat in maps)])


def overlay(
    image: Image.Image, heat: np.ndarray, peak: float | None = None, mask: Image.Image | None = None
) -> Image.Image:
    """`heat (height, width)` of the picture, 0 to `peak`, in color over the picture (enlarged).

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
    drawn = enlarge(image)
    layer = heat_layer(heat, float(heat.max()) if peak is None else peak, drawn.size)
    drawn = Image.alpha_composite(drawn.convert("RGBA"), layer).convert("RGB")
    return drawn if mask is None else outline(drawn, mask)


def heat_layer(heat: np.ndarray, peak: float, size: tuple[int, int]) -> Image.Image:
    """`heat (height, width)`, 0 to `peak`, as a layer to lay over a picture: RGBA of `size` (width, height).

    Color and opacity both follow the heat: 0 is transparent, `peak` is the hottest color at `OPACITY`.
    """
    share = np.clip(heat / peak, 0, 1) if peak > 0 else np.zeros_like(heat)
    levels = Image.fromarray((share * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    layer = Image.fromarray((COLORS(np.asarray(levels))[..., :3] * 255).round().astype(np.uint8))
    layer.putalpha(levels.point(lambda level: round(OPACITY * level)))
    return layer


def outline(image: Image.Image, mask: Image.Image, color: tuple[int, ...] = _PAPER) -> Image.Image:
    """The picture (enlarged) with the border of a mask of its proportions, a line of a color between two dark ones."""
    drawn = enlarge(image).copy()
    inside = mask.convert("L").point(lambda value: 255 if value else 0).resize(drawn.size, Image.Resampling.NEAREST)
    inside = inside.filter(ImageFilter.BoxBlur(4)).point(lambda value: 255 if value > 127 else 0)  # rounds the steps
    for width, line in ((9, (0, 0, 0)), (5, color)):
        # Where a square of the line's width is neither empty nor full; rank filters take 20 times as long
        border = inside.filter(ImageFilter.BoxBlur(width // 2)).point(lambda value: 255 if 2 < value < 253 else 0)
        drawn.paste(line, mask=border)
    return drawn


def outline_phrases(image: Image.Image, phrases: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """The picture (enlarged) with the border of each phrase's mask in a color of its own, and its words below."""
    drawn, font = enlarge(image), _font(22)
    lines: list[tuple[str, tuple[int, ...]]] = []
    for (words, mask), color in zip(phrases, _PHRASES, strict=False):
        drawn = outline(drawn, mask, color)
        lines += [(line, color) for line in _lines(words, font, drawn.width)]
    sheet = Image.new("RGB", (drawn.width, drawn.height + 28 * len(lines)), _PAPER)
    sheet.paste(drawn)
    for index, (line, color) in enumerate(lines):
        ImageDraw.Draw(sheet).text((0, drawn.height + 28 * index), line, fill=color, font=font)
    return sheet


def panels(
    rows: Sequence[Sequence[tuple[str, Image.Image]]],
    heading: str = "",
    side: int = 320,
    peaks: Sequence[float] = (),
    most_lines: int = MOST_LINES,
) -> Image.Image:
    """Rows of titled pictures on white, each fitted into a square of `side` pixels, under a heading.

    Args:
        peaks: draws scales of heat, up to this many times an even spread, each below its row: one for every row, or
            one for all of them below the last.
        most_lines: of a title; longer ones are cut.
    """
    font, large = _font(15), _font(19)
    columns = max(len(row) for row in rows)
    width = GAP + columns * (side + GAP)
    head = _lines(heading, large, width - 2 * GAP)
    titles = [[_lines(title, font, side, most_lines) for title, _ in row] for row in rows]
    fitted = [
        [ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS) for _, image in row]
        for row in rows
    ]
    labels = [20 * max(map(len, row)) + 8 for row in titles]
    heights = [max(image.height for image in row) for row in fitted]
    top = 26 * len(head) + GAP + (6 if head else 0)
    scales = [*[None] * (len(rows) - len(peaks)), *peaks]
    sheet = Image.new(
        "RGB", (width, top + sum(labels) + sum(heights) + GAP * len(rows) + _SCALE_HEIGHT * len(peaks)), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(head):
        draw.text((GAP, 12 + 26 * index), line, fill=_INK, font=large)
    y = top
    for row_titles, images, label, height, peak in zip(titles, fitted, labels, heights, scales, strict=True):
        for column, (lines, image) in enumerate(zip(row_titles, images, strict=True)):
            x = GAP + column * (side + GAP)
            for index, line in enumerate(lines):  # the last line stands on the picture
                draw.text((x, y + label - 4 + 20 * (index - len(lines))), line, fill=_INK, font=font)
            sheet.paste(image, (x, y + label))
        y += label + height + GAP
        if peak is not None:
            _draw_scale(sheet, y, peak, font)
            y += _SCALE_HEIGHT
    return sheet


def _draw_scale(sheet: Image.Image, y: int, peak: float, font: ImageFont.FreeTypeFont) -> None:
    draw, x = ImageDraw.Draw(sheet), GAP
    words = ("0", f"{peak:.3g} × an even spread over the picture")
    draw.text((x, y), words[0], fill=_INK, font=font)
    x += round(font.getlength(words[0])) + 8
    length = max(40, min(180, sheet.width - x - round(font.getlength(words[1])) - GAP - 8))
    bar = heat_layer(np.linspace(0, 1, length)[None], 1, (length, 12))
    sheet.paste(bar, (x, y + 4), bar)
    draw.text((x + length + 8, y), words[1], fill=_INK, font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu as Matplotlib carries it: Pillow's own font has no Greek, Cyrillic or Arabic."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _lines(text: str, font: ImageFont.FreeTypeFont, width: float, most: int = MOST_LINES) -> list[str]:
    """The text in lines of at most `width` pixels, cut with an ellipsis where they would be more than `most`."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        rest = " ".join(paragraph.split())
        while rest:
            fits = len(rest)
            while fits > 1 and font.getlength(rest[:fits]) > width:
                fits -= 1
            if fits < len(rest):
                space = rest.rfind(" ", 1, fits + 1)
                fits = space if space > 0 else fits  # a word that is too long is broken
            lines.append(rest[:fits].rstrip())
            rest = rest[fits:].lstrip()
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a chart as PNG, whole or not at all; the same chart gives the same bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
