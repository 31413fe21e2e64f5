"""Object sources of the grounded scenes: what can be pasted, in which styles, and its pixels.

A source has `kinds` (name -> `Kind`), `colors` (empty when the objects keep their own) and
`draw(...)`, which returns one object as a `Sprite`. `IconSource` draws the glyphs listed in icons.json from the icon
fonts that the `qtawesome` package ships; only the font files are read, Qt is never imported. A glyph is drawn in two
tones: its ink in the named color and its enclosed holes in a lighter (for white: darker) one, so that an object is
opaque and its mask is its silhouette. `CutoutSource` reads RGBA pictures from a folder made by fetch_cutouts.py.
"""

import difflib
import importlib.util
import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from agevlm.data.rows import resolve_inside
from agevlm.images import open_image
from agevlm.store import digest, read_json, read_text


COLORS = {
    "red": (214, 34, 40),
    "orange": (245, 134, 20),
    "yellow": (250, 220, 40),
    "green": (34, 150, 60),
    "blue": (36, 84, 214),
    "purple": (130, 48, 168),
    "white": (248, 248, 248),
    "black": (22, 22, 24),
}
FONTS = {
    "materialdesign": ("materialdesignicons6-webfont-*.ttf", "materialdesignicons6-webfont-charmap-*.json"),
    "fontawesome": ("fontawesome6-solid-webfont-*.ttf", "fontawesome6-solid-webfont-charmap-*.json"),
    "phosphor": ("phosphor-*.ttf", "phosphor-charmap-*.json"),
    "remix": ("remixicon-*.ttf", "remixicon-charmap-*.json"),
}
_MIN_MIP, _MAX_MIP = 32, 1024


@dataclass(frozen=True)
class Kind:
    """One name of a source. Kinds of the same `group` are near synonyms and never share a scene."""

    name: str
    category: str
    group: str
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Sprite:
    """A drawn object: layers are painted in order, each a color or an RGB picture through an 8-bit mask."""

    layers: tuple[tuple["tuple[int, int, int] | Image.Image", Image.Image], ...]
    alpha: np.ndarray  # (side, side) bool, the silhouette

    @property
    def side(self) -> int:
        return self.alpha.shape[0]


def check_known(what: str, wanted: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError naming the first of `wanted` that is not in `known`, with the closest known ones."""
    for value in wanted:
        if value not in known:
            close = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"unknown {what} {value!r}; {hint}")


def _restrict(kinds: dict[str, Kind], names: Collection[str] | None) -> dict[str, Kind]:
    if names is None:
        return kinds
    check_known("object name", names, kinds)
    wanted = set(names)
    return {name: kind for name, kind in kinds.items() if name in wanted}


def table_digest(text: str, files: Iterable[Path] = ()) -> str:
    """Identity of a table and of the files (by name and size) that belong to it."""
    listing = "".join(f"/{path.name}:{path.stat().st_size}" for path in files)
    return digest(text + listing, size=8)


def _mip(extent: int) -> int:
    """Power of two from which `extent` pixels are reached by shrinking to no less than half."""
    return min(_MAX_MIP, max(_MIN_MIP, 1 << math.ceil(math.log2(max(extent, 1)))))


def rgb(values: Iterable[int]) -> tuple[int, int, int]:
    red, green, blue = values
    return red, green, blue


def _place(picture: Image.Image, extent: float, angle: float) -> Image.Image:
    """Scales a square `picture` to `extent` pixels and turns it by `angle` degrees, in one resampling."""
    radians = math.radians(angle)
    cos, sin = math.cos(radians), math.sin(radians)
    side = math.ceil(extent * (abs(cos) + abs(sin)))
    scale = picture.width / extent
    a, b, d, e = cos * scale, sin * scale, -sin * scale, cos * scale
    center, middle = side / 2, picture.width / 2
    matrix = (a, b, middle - a * center - b * center, d, e, middle - d * center - e * center)
    return picture.transform((side, side), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """`picture` scaled so that its longer side fills a square of `side` pixels but for a clear rim of one pixel."""
    scale = (side - 2) / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    square = Image.new(picture.mode, (side, side))
    scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return square


def _outside(ink: np.ndarray) -> np.ndarray:
    """The background of a glyph: pixels without ink (bool, 2-D) that are connected to the border."""
    free = ~ink
    out = np.zeros_like(free)
    out[0], out[-1], out[:, 0], out[:, -1] = free[0], free[-1], free[:, 0], free[:, -1]
    count = -1
    while count != (count := int(out.sum())):  # sweeps in four directions until nothing changes
        for view, open_ in ((out, free), (out[::-1], free[::-1]), (out.T, free.T), (out.T[::-1], free.T[::-1])):
            for row in range(1, len(view)):
                view[row] |= view[row - 1] & open_[row]
    return out


class IconSource:
    """Glyphs of icon fonts in named colors."""

    name = "icons"

    def __init__(self, names: Collection[str] | None = None, colors: Collection[str] | None = None):
        text = Path(__file__).with_name("icons.json").read_text(encoding="utf-8")
        self.digest, table = table_digest(text), json.loads(text)
        kinds = {n: Kind(n, row["category"], row["group"], tuple(row["glyphs"])) for n, row in table.items()}
        self.kinds = _restrict(kinds, names)
        if colors is not None:
            check_known("color", colors, COLORS)
        self.colors = tuple(COLORS) if colors is None else tuple(c for c in COLORS if c in set(colors))
        self._glyphs = {(n, style): glyph for n, row in table.items() for style, glyph in row["glyphs"].items()}
        self._layers = lru_cache(maxsize=4096)(self._draw_glyph)
        self._font = lru_cache(maxsize=64)(lambda style, size: ImageFont.truetype(self._file(FONTS[style][0]), size))

    @cached_property
    def _folder(self) -> Path:
        spec = importlib.util.find_spec("qtawesome")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError("icons are drawn from the fonts of the package qtawesome; `pip install qtawesome`")
        return Path(spec.submodule_search_locations[0]) / "fonts"

    def _file(self, pattern: str) -> Path:
        found = sorted(self._folder.glob(pattern))
        if not found:
            raise ValueError(f"no file {pattern!r} in {self._folder}; install qtawesome 1.4 or newer")
        return found[-1]

    @cached_property
    def _charmaps(self) -> dict[str, dict[str, str]]:
        return {
            style: json.loads(self._file(chars).read_text(encoding="utf-8")) for style, (_, chars) in FONTS.items()
        }

    def _draw_glyph(self, name: str, style: str, mip: int) -> tuple[Image.Image, Image.Image]:
        """(ink, silhouette) of a glyph as 8-bit squares of `mip` pixels; the glyph's longer side fills them."""
        glyph = self._glyphs[name, style]
        if glyph not in self._charmaps[style]:
            raise ValueError(f"icons.json: {name!r} names the glyph {glyph!r}, which the font {style!r} does not have")
        char = chr(int(self._charmaps[style][glyph], 16))
        mask, _ = self._font(style, 2 * mip).getmask2(char, mode="L")
        drawn = Image.frombytes("L", mask.size, bytes(mask))
        ink = np.asarray(_fit(drawn.crop(drawn.getbbox()), mip))
        silhouette = np.where(_outside(ink >= 128), ink, 255).astype(np.uint8)
        return Image.fromarray(ink), Image.fromarray(silhouette)

    def draw(self, name: str, style: str, color: str | None, extent: int, angle: float, shade: float) -> Sprite:
        """`extent`: longer side in pixels before turning; `shade`: -1 (darker) to 1 (lighter)."""
        assert color is not None, "icons have no colors of their own"
        ink, silhouette = (_place(layer, extent, angle) for layer in self._layers(name, style, _mip(extent)))
        tone = rgb(min(255, max(0, round(value + 10 * shade))) for value in COLORS[color])
        hole = rgb(round(value * 0.4 + (70 if color == "white" else 255) * 0.6) for value in tone)
        return Sprite(((hole, silhouette), (tone, ink)), np.asarray(silhouette) >= 128)


class CutoutSource:
    """RGBA pictures with names: a folder with cutouts.json = [{file, name, category, style, group?}, ...]."""

    name = "cutouts"
    colors: tuple[str, ...] = ()

    def __init__(self, folder: str | Path, names: Collection[str] | None = None):
        self.folder = Path(folder)
        listing = self.folder / "cutouts.json"
        if not listing.is_file():
            raise ValueError(f"{self.folder} has no cutouts.json; make it with `agevlm data cutouts`")
        text = read_text(listing)
        self._files: dict[tuple[str, str], Path] = {}
        found: dict[str, dict] = {}
        for number, row in enumerate(read_json(listing)):
            missing = {"file", "name", "category", "style"} - set(row)
            if missing:
                raise ValueError(f"{listing}: entry {number} lacks {', '.join(sorted(missing))}")
            if (row["name"], row["style"]) in self._files:
                raise ValueError(f"{listing}: entry {number} repeats {row['name']!r}, {row['style']!r}; keep one")
            self._files[row["name"], row["style"]] = resolve_inside(self.folder, row["file"])
            found.setdefault(row["name"], row)
        absent = [path for path in self._files.values() if not path.is_file()]
        if absent:
            raise ValueError(
                f"{listing}: {len(absent)} pictures are missing, e.g. {absent[0]}; fetch the folder again"
            )
        self.digest = table_digest(text, self._files.values())
        styles = {name: tuple(sorted(s for n, s in self._files if n == name)) for name in found}
        kinds = {n: Kind(n, found[n]["category"], found[n].get("group", n), styles[n]) for n in sorted(found)}
        self.kinds = _restrict(kinds, names)
        self._picture = lru_cache(maxsize=2048)(self._load)

    def _load(self, name: str, style: str, mip: int) -> Image.Image:
        """The cut-out cropped to its visible part, centerd in a square of `mip` pixels, premultiplied alpha."""
        path = self._files[name, style]
        picture = open_image(path, where=f"cut-out {path.name}", mode="RGBA")
        box = picture.getchannel("A").point(lambda value: 255 * (value >= 128)).getbbox()
        if box is None:
            raise ValueError(f"cut-out {path}: nothing in it is opaque; remove its entry from cutouts.json")
        if mip > _MIN_MIP and mip >= 2 * max(picture.size):
            return self._picture(name, style, mip // 2)  # the same entry of the cache serves every larger size
        return _fit(picture.crop(box).convert("RGBa"), mip)

    def draw(self, name: str, style: str, color: str | None, extent: int, angle: float, shade: float) -> Sprite:
        """As `IconSource.draw`; a cut-out keeps its own colors, `shade` is not used."""
        picture = _place(self._picture(name, style, _mip(extent)), extent, angle).convert("RGBA")
        alpha = picture.getchannel("A")
        return Sprite(((picture.convert("RGB"), alpha),), np.asarray(alpha) >= 128)
