"""Makes a folder of named RGBA cut-outs from published packages; the pictures are never part of the project.

`agevlm data cutouts` downloads with the ordinary clients (`apt-get download`, `npm pack`) the Tux Paint stamps (GPL-2:
photographs) and the Fluent 3D emoji (MIT: drawings) with OpenMoji's names (CC-BY-SA 4.0), keeps plain single objects
under singular names and writes PNG files and cutouts.json: [{file, name, category, group, style}]. Needs Debian's
`dpkg-deb` and `npm`.
"""

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from agevlm.data.rows import resolve_inside
from agevlm.images import open_image
from agevlm.store import new_folder

from .cutout_names import clean_name, emoji_category, synonym_group, tux_category, tux_name


APT_PACKAGE = "tuxpaint-stamps-default"
NPM_PACKAGES = {"fluent": "@lobehub/fluent-emoji-3d@1.1.0", "openmoji": "openmoji@17.0.0"}
_STAMPS = "usr/share/tuxpaint/stamps"
_LEAST_PIXELS, _LEAST_OPAQUE, _LEAST_CLEAR = 60, 0.08, 0.02


@dataclass(frozen=True)
class Cutout:
    name: str
    category: str
    style: str
    picture: Image.Image


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise ValueError(f"`{command[0]}` is not installed; it is needed to fetch the cut-outs")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed with status {done.returncode}: {done.stderr.strip()[-500:]}")


def _archive(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"expected one archive {pattern} in {folder}, found {len(found)}; remove the others")
    return found[0]


def download(folder: Path) -> None:
    """Downloads the files that `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{APT_PACKAGE}_*.deb")):
        _run(["apt-get", "download", APT_PACKAGE], folder)
    for package in NPM_PACKAGES.values():
        archive = package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
        if not (folder / archive).is_file():
            _run(["npm", "pack", "--silent", package], folder)


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
    with tarfile.open(names) as archive:
        table = json.load(_member(archive, names, "package/data/openmoji.json"))
    known = {_code(row["hexcode"]): row for row in table}
    with tarfile.open(pictures) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            row = known.get(_code(Path(member.name).stem))
            if not member.isfile() or not member.name.endswith(".webp") or row is None:
                continue
            name, category = clean_name(row["annotation"].lower()), emoji_category(row["subgroups"])
            if name is None or category is None:
                continue
            data = _member(archive, pictures, member.name).read()
            picture = open_image(data, where=f"emoji {member.name}", mode="RGBA")
            if usable(picture):
                yield Cutout(name, category, "drawing", picture)


def _member(archive: tarfile.TarFile, path: Path, name: str):
    try:
        found = archive.extractfile(name)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(f"{path.name} has no file {name}; fetch the package version named in this script")
    return found


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
        temporary = Path(name)
        archives = Path(downloads) if downloads else temporary / "archives"
        download(archives)
        unpacked = temporary / "unpacked"
        unpacked.mkdir()
        _run(["dpkg-deb", "-x", str(_archive(archives, f"{APT_PACKAGE}_*.deb").resolve()), str(unpacked)], temporary)

        def every() -> Iterator[Cutout]:
            yield from read_emoji(
                _archive(archives, "lobehub-fluent-emoji-3d-*.tgz"), _archive(archives, "openmoji-*.tgz")
            )
            yield from read_stamps(unpacked / _STAMPS)

        return write_cutouts(every(), made)
