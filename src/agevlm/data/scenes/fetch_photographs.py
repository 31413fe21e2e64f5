"""Real photographs of animals with questions on presence: a test for models that were trained on composed scenes.

`agevlm data photographs` downloads Debian's `gcompris-qt-data` and takes the photographs of three of its Qt archives,
whose file names say what they show. Each has a license of its own; none is part of the project. Written are the files
as they are, photographs.json: [{file, name, license, author, source, changes}], contact_sheet.png, and questions.jsonl
for `agevlm eval --data`.

As in POPE, each category asks twice about each photograph: for what it shows, and for what it does not show, another
animal (`adversarial`) or a thing of the cut-outs, or without them of the drawn icons (`random`). With cut-outs a
category also says whether both names are among their training names.
"""

import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from agevlm.data.rows import resolve_inside
from agevlm.images import open_image, save_image
from agevlm.progress import Bar
from agevlm.store import check_free, new_folder, read_table, write_bytes, write_json, write_lines

from .contact_sheet import draw_entries
from .cutout_names import photograph_name, synonym_group
from .foreground import PACKAGE, check_runtime, load_foreground
from .objects import CutoutSource, IconSource
from .packages import fetch_apt, fetch_npm, unpack_deb
from .qt_resources import read_resources
from .questions import presence_query
from .splits import make_pools


APT_PACKAGE = "gcompris-qt-data"
_ARCHIVES = "usr/share/gcompris-qt/rcc"
_ACTIVITIES = ("explore_farm_animals", "explore_world_animals", "erase")
_SUFFIXES = (".jpg", ".jpeg", ".webp")
_RIGHTS = {"License": "license", "Copyright": "author", "Source": "source", "Comments": "changes"}
_FIELD = re.compile(rf"({'|'.join(_RIGHTS)}|Files):(.*)")
# Categories of cut-outs and icons that no photograph shows anything of
_ELSEWHERE = frozenset({"clothing", "electronics", "food", "instrument", "office", "tool", "vehicle"})
_SHOWN = (560, 560)  # pixels on the contact sheet

Entry = dict[str, Any]  # of photographs.json


def read_photographs(archive: Path) -> Iterator[tuple[Entry, bytes]]:
    """The photographs of a Qt archive. Raises ValueError for a damaged one, or one without a license."""
    if not archive.is_file():
        raise ValueError(f"{APT_PACKAGE} has no {archive.name}; fetch the version of Debian 12")
    files = read_resources(archive)
    for path in sorted(path for path in files if path.endswith(_SUFFIXES)):
        folder, _, file = path.rpartition("/")
        name = photograph_name(f"{archive.stem}/{Path(file).stem}")
        if name is None:
            continue
        rights = read_rights(files.get(f"{folder}/README", b"").decode(errors="replace")).get(file, {})
        if "license" not in rights:
            raise ValueError(f"{archive.name}: no README gives a license for {path}; exclude it in cutout_names.json")
        open_image(files[path], where=f"{archive.name}: photograph {path}")
        yield {"file": f"{archive.stem}/{file}", "name": name, **rights}, files[path]


def read_rights(text: str) -> dict[str, dict[str, str]]:
    """File -> {license, author, source, changes}, out of paragraphs of fields ("License: ...", "Files: ...")."""
    found: dict[str, dict[str, str]] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = defaultdict(list)
        key = ""
        for line in paragraph.splitlines():
            match = _FIELD.match(line)
            key, value = match.groups() if match else (key, line)
            fields[key] += value.split()
        rights = {name: " ".join(fields[key]) for key, name in _RIGHTS.items() if fields[key]}
        found |= {file.strip(","): rights for file in fields["Files"]}
    return found


def read_names(
    cutouts: str | Path | None, scenes: str | Path | None = None
) -> tuple[list[str], dict[str, tuple[str, ...]] | None]:
    """Names of things that no photograph shows; and of a folder of cut-outs, training name -> training styles: of all
    cut-outs, or of those that are in `scenes`. Raises ValueError where no scenes or cut-outs are."""
    names = None if scenes is None else read_table(Path(scenes) / "scenes.json").get("names")
    if scenes is not None and not names:
        raise ValueError(f"{scenes} holds no scenes (scenes.json, field names); make them with `agevlm data scenes`")
    source = IconSource() if cutouts is None else CutoutSource(cutouts, names)
    things = [name for name, kind in source.kinds.items() if kind.category in _ELSEWHERE]
    if cutouts is None:
        return things, None
    train = make_pools(source.kinds, source.colors)["train"]
    return things, {name: train.styles[name] for name in train.names}


def ask(entries: Sequence[Entry], things: Sequence[str], trained: Mapping | None, seed: int) -> Iterator[Entry]:
    """The questions, as many answered yes as no.

    Raises:
        ValueError: no name is absent from a photograph and, like its own, seen in training or unseen.
    """

    def seen(name: str) -> str:
        return "" if trained is None else ", seen name" if name in trained else ", unseen name"

    animals = sorted({entry["name"] for entry in entries})
    for file, name in ((entry["file"], entry["name"]) for entry in entries):
        for strategy, names in (("adversarial", animals), ("random", things)):
            category = strategy + seen(name)
            absent = [n for n in names if synonym_group(n) != synonym_group(name) and seen(n) == seen(name)]
            if not absent:
                raise ValueError(f"no name is left to ask {file} for ({category}); give other cut-outs, or none")
            place = f"{file.partition('.')[0].replace('/', '-')}-{strategy}"
            for answer, noun in (("yes", name), ("no", random.Random(f"{seed}/{place}").choice(absent))):
                yield {"id": f"{place}-{answer}", "image": file, "question": presence_query(noun), "answer": answer,
                       "kind": "yes-no", "category": category}  # fmt: skip


def fetch_photographs(
    output: Path,
    downloads: Path | None = None,
    cutouts: Path | None = None,
    scenes: Path | None = None,
    foreground: bool = False,
    seed: int = 0,
) -> tuple[list[Entry], list[Entry]]:
    """Fills the new folder `output`; returns the entries of photographs.json and the questions.

    Args:
        downloads: keeps the archives; those that it has are not fetched again.
        cutouts: folder of `agevlm data cutouts` that models are trained on.
        scenes: the scenes of those cut-outs that they are trained on, where these show some of the names.
        foreground: find the foreground, whatever it shows, as the mask of the questions answered yes.
    """
    check_free(output)
    if foreground:
        check_runtime()
    things, trained = read_names(cutouts, scenes)
    with new_folder(output) as made, tempfile.TemporaryDirectory() as name:
        archives, unpacked = downloads or Path(name) / "archives", Path(name) / "unpacked"
        unpack_deb(fetch_apt(APT_PACKAGE, archives), unpacked)
        entries = []
        for activity in _ACTIVITIES:
            for entry, content in read_photographs(unpacked / _ARCHIVES / f"{activity}.rcc"):
                write_bytes(resolve_inside(made, entry["file"]), content)
                entries.append(entry if trained is None else entry | {"styles": trained.get(entry["name"], ())})
        questions = list(ask(entries, things, trained, seed))
        if foreground:
            find = load_foreground(fetch_npm(PACKAGE, archives))
            for entry in Bar(entries, desc="foreground"):
                mask = find(open_image(made / entry["file"], entry["file"]))
                if mask.getbbox():  # something stands out
                    entry["mask"] = f"masks/{Path(entry['file']).with_suffix('.png')}"
                    save_image(mask, made / entry["mask"])
            masks = {entry["file"]: {"mask": entry["mask"]} for entry in entries if "mask" in entry}
            questions = [row | masks.get(row["image"], {}) if row["answer"] == "yes" else row for row in questions]
        write_json(made / "photographs.json", entries)
        write_lines(made / "questions.jsonl", questions)
        draw_entries([_shown(made, entry) for entry in entries], made / "contact_sheet.png")
    return entries, questions


def _shown(folder: Path, entry: Entry) -> tuple[Image.Image, Image.Image | None, str]:
    picture = open_image(folder / entry["file"], entry["file"])
    mask = open_image(folder / entry["mask"], entry["mask"], mode="1") if "mask" in entry else None
    for shrunk in (picture, mask):
        if shrunk is not None:
            shrunk.thumbnail(_SHOWN)
    return picture, mask, entry["name"]
