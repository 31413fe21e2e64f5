"""Makes a folder of named RGBA cut-outs from published packages; the pictures are never part of the project.

`agevlm data cutouts` downloads with the ordinary clients (`apt-get download`, `npm pack`) the Tux Paint stamps (GPL-2:
photographs) and the Fluent 3D emoji (MIT: drawings) with OpenMoji's names (CC-BY-SA 4.0), keeps plain single objects
under singular names and writes PNG files and cutouts.json: [{file, name, category, group, style}]. Needs Debian's
`dpkg-deb` and `npm`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from agevlm.data.rows import resolve_inside
from agevlm.images import open_image
from agevlm.store import new_folder

from .cutout_names import clean_name, emoji_category, synonym_group, tux_category, tux_name
from .packages import fetch_apt, fetch_npm, member, open_archive, unpack_deb


APT_PACKAGE = "tuxpaint-stamps-default"
PICTURES, NAMES = "@lobehub/fluent-emoji-3d@1.1.0", "openmoji@17.0.0"
_STAMPS = "usr/share/tuxpaint/stamps"
_LEAST_PIXELS, _LEAST_OPAQUE, _LEAST_CLEAR = 60, 0.08, 0.02


@dataclass(frozen=True)
class Cutout:
    name: str
    category: str
    style: str
    picture: Image.Image


def usable(picture: Image.Image) -> bool:
    """Large enough, and neither nearly empty nor a full rectangle."""
    opaque = picture.getchannel("A").point(lambda value: 255 * (value >= 128))
    box = opaque.getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < _LEAST_PIXELS:
        return False
    crop = opaque.crop(box)
    share = crop.histogram()[255] / (crop.width * crop.height)
    return _LEAST_OPAQUE <= share <= 1 - _LEAST_CLEAR


def read_stamps(stamps: Path) -> Iterator[Cutout]:
    """Cut-outs of an unpacked stamps folder: PNG pictures with an English sentence in a .txt beside them."""
    for path in sorted(stamps.rglob("*.png")):
        category, text = tux_category(path.relative_to(stamps).as_posix()), path.with_suffix(".txt")
        if category is None or not text.is_file():
            continue
        lines = text.read_text(encoding="utf-8").splitlines()
        name = tux_name(lines[0]) if lines else None
        if name is None:
            continue
        picture = open_image(path, where=f"stamp {path.name}", mode="RGBA")
        if usable(picture):
            yield Cutout(name, category, "photo", picture)


def read_emoji(pictures: Path, names: Path) -> Iterator[Cutout]:
    """Cut-outs of the Fluent archive (assets/<code points>.webp), named by OpenMoji's table (data/openmoji.json)."""
    with open_archive(names) as archive:
        table = json.load(member(archive, names, "package/data/openmoji.json"))
    known = {_code(row["hexcode"]): row for row in table}
    with open_archive(pictures) as archive:
        for entry in sorted(archive.getmembers(), key=lambda entry: entry.name):
            row = known.get(_code(Path(entry.name).stem))
            if not entry.isfile() or not entry.name.endswith(".webp") or row is None:
                continue
            name, category = clean_name(row["annotation"].lower()), emoji_category(row["subgroups"])
            if name is None or category is None:
                continue
            data = member(archive, pictures, entry.name).read()
            picture = open_image(data, where=f"emoji {entry.name}", mode="RGBA")
            if usable(picture):
                yield Cutout(name, category, "drawing", picture)


def _code(text: str) -> str:
    """A sequence of code points without the invisible variation selector."""
    return "-".join(part.lstrip("0") for part in text.upper().split("-") if part != "FE0F")


def write_cutouts(cutouts: Iterator[Cutout], out: Path) -> list[dict]:
    """Writes one PNG for each (name, style), the first seen, and cutouts.json; returns the entries."""
    entries: dict[tuple[str, str], dict] = {}
    categories: dict[str, str] = {}
    for cutout in cutouts:
        if (cutout.name, cutout.style) in entries:
            continue
        file = f"{cutout.style}/{cutout.name.replace(' ', '_')}.png"
        path = resolve_inside(out, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        cutout.picture.save(path)
        category = categories.setdefault(cutout.name, cutout.category)  # both styles of a name agree
        entries[cutout.name, cutout.style] = {
            "file": file, "name": cutout.name, "category": category, "group": synonym_group(cutout.name),
            "style": cutout.style,
        }  # fmt: skip
    listing = sorted(entries.values(), key=lambda entry: (entry["name"], entry["style"]))
    (out / "cutouts.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return listing


def fetch_cutouts(out: str | Path, downloads: str | Path | None = None) -> list[dict]:
    """Fills the new folder `out` with cut-outs; `downloads` keeps the archives there and uses those it already has."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose a new folder")
    with new_folder(out) as made, tempfile.TemporaryDirectory() as name:
        archives = Path(downloads) if downloads else Path(name) / "archives"
        unpacked = Path(name) / "unpacked"
        stamps = fetch_apt(APT_PACKAGE, archives)
        pictures, names = fetch_npm(PICTURES, archives), fetch_npm(NAMES, archives)
        unpack_deb(stamps, unpacked)
        return write_cutouts(chain(read_emoji(pictures, names), read_stamps(unpacked / _STAMPS)), made)
