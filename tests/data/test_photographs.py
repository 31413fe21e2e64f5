"""Photographs: read out of Debian's package under clean names with their licenses, asked about, and masked."""

import io
import json
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image, ImageDraw
from qt_archive import qt_archive
from stand_ins import called, put_in_path

from agevlm.data.cli import photographs as main
from agevlm.data.scenes.cutout_names import photograph_name, synonym_group
from agevlm.data.scenes.fetch_photographs import ask, fetch_photographs, read_names, read_photographs, read_rights
from agevlm.data.scenes.objects import CutoutSource
from agevlm.data.scenes.splits import make_pools
from agevlm.evaluation.own import PAPER
from agevlm.evaluation.own_rows import load_own
from agevlm.images import open_image


NAMES = ("cat", "kitten", "giraffe", "horse", "calf", "cow", "owl", "bat")
README = """Copyright: Jane Doe
License: CC-BY-SA 4.0
Source: https://example.org/one
Comments: cropping
Files: {0}

Files:
{1}
drawn.svg
License: Public Domain
Copyright: nobody, 2020
"""


def webp(size=(60, 40), color="yellow") -> bytes:
    """A bright disc on black, on the left."""
    picture = Image.new("RGB", size)
    ImageDraw.Draw(picture).ellipse((5, 5, 30, 30), fill=color)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def archive_of(activity: str, *names: str, way: str = "plain", readme: str = README) -> bytes:
    """An archive of two photographs and what else lies beside them."""
    folder = f"gcompris/src/activities/{activity}/resource"
    files = {
        f"{folder}/{name}.webp": webp(color=color) for name, color in zip(names, ("yellow", "white"), strict=True)
    }
    files[f"{folder}/README"] = readme.format(*(f"{name}.webp" for name in names)).encode()
    return qt_archive(files | {f"{folder}/drawn.svg": b"<svg/>", f"{folder}/cat.ogg": b"meow"}, way=way)


def model() -> bytes:
    """An ONNX model that takes bright pixels for the foreground."""
    shape = [1, 3, 1024, 1024]
    nodes = [helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1]),
             helper.make_node("HardSigmoid", ["mean"], ["output"], alpha=100.0, beta=0.5)]  # fmt: skip
    graph = helper.make_graph(
        nodes, "bright", [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1, *shape[2:]])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def write_weights(path, added: bytes = b"") -> None:
    """The npm archive with the model in two parts."""
    content = model()
    chunks = {"one": content[:90], "two": content[90:] + added}
    table = {"/models/medium": {"size": len(content), "chunks": [{"hash": name} for name in chunks]}}
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (chunks | {"resources.json": json.dumps(table).encode()}).items():
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Stand-ins for apt-get, npm and dpkg-deb that hand out tiny archives, first in the search path."""
    folder = tmp_path / "package/usr/share/gcompris-qt/rcc"
    folder.mkdir(parents=True)
    (folder / "explore_farm_animals.rcc").write_bytes(archive_of("explore_farm_animals", "cat", "horse"))
    (folder / "explore_world_animals.rcc").write_bytes(archive_of("explore_world_animals", "dragon", "giraffe"))
    (folder / "erase.rcc").write_bytes(archive_of("erase", "red_panda", "swans", way="zlib"))
    weights = "imgly-background-removal-data-1.4.5.tgz"
    write_weights(tmp_path / weights)
    scripts = {
        "apt-get": 'touch "$2_1_all.deb"',
        "npm": f"cp {tmp_path / weights} .",
        "dpkg-deb": f'cp -r {tmp_path}/package/. "$3"',
    }
    put_in_path(tmp_path, monkeypatch, scripts)
    return tmp_path


@pytest.fixture
def cutouts(tmp_path):
    """Cut-outs of which some names are held out; every name is an animal and a thing by turns."""
    folder = tmp_path / "cutouts"
    folder.mkdir()
    listing = []
    names = ("cat", "horse", "giraffe", "swan", "hammer", "key", "bus", "car", "saw", "plum", "pear", "cello", "gong",
             "boot", "cap", "pen")  # fmt: skip
    for number, name in enumerate(names):
        Image.new("RGBA", (9, 9), "red").save(folder / f"{name}.png")
        category = "mammal" if number < 4 else "tool"
        listing.append({"file": f"{name}.png", "name": name, "category": category, "style": "photo"})
    (folder / "cutouts.json").write_text(json.dumps(listing))
    return folder


def test_fetching(clients, capsys):
    out, downloads = clients / "photographs", clients / "downloads"
    main(["--output", str(out), "--downloads", str(downloads), "--foreground"])
    said = capsys.readouterr().out
    assert "6 photographs of 6 names, 6 with a foreground\n" in said and "12 adversarial; 12 random" in said
    assert "3 CC-BY-SA 4.0; 3 Public Domain" in said
    assert said.endswith(f"; next: agevlm eval CHECKPOINT --data {out}/questions.jsonl --output evaluation\n")
    entries = json.loads((out / "photographs.json").read_text())
    assert [entry["name"] for entry in entries] == ["cat", "horse", "komodo dragon", "giraffe", "red panda", "swan"]
    assert entries[0] == {
        "file": "explore_farm_animals/cat.webp", "name": "cat", "license": "CC-BY-SA 4.0", "author": "Jane Doe",
        "source": "https://example.org/one", "changes": "cropping", "mask": "masks/explore_farm_animals/cat.png",
    }  # fmt: skip
    assert entries[1]["license"] == "Public Domain" and entries[1]["author"] == "nobody, 2020"
    assert (out / "erase/swans.webp").read_bytes() == webp(color="white")  # as it is
    assert Image.open(out / "contact_sheet.png").width > 500
    fetch_photographs(clients / "second", downloads)
    asked = called(clients)
    assert sorted(asked) == ["apt-get", "dpkg-deb", "dpkg-deb", "npm"]  # nothing is downloaded twice
    with pytest.raises(ValueError, match="is there already"):
        fetch_photographs(out)


def test_the_questions_are_own_questions(clients):
    """As `agevlm eval --data` reads them: with the mask of what is there, and a measure for each category."""
    out = clients / "photographs"
    fetch_photographs(out, foreground=True)
    rows = load_own(out / "questions.jsonl", strict=True)
    assert len(rows) == 24 and len(set(rows["id"])) == 24 and len(set(rows["picture"])) == 6
    for row in rows:
        assert row["kind"] == "yes-no" and not row["guessed"]
        assert len(row["guidance"]) == (row["answers"] == ["yes"])
        for phrase in row["guidance"]:
            mask = np.asarray(open_image(phrase["mask"], row["id"], mode="1"))
            assert mask.shape == (40, 60) and mask[17, 17] and not mask[:, 40:].any()
            assert phrase["query"] == row["question"]
    found = PAPER.measures(
        list(rows), ["yes"] * 24, np.array([row["answers"] == ["yes"] for row in rows], dtype=float)
    )
    assert {key for key in found if key[0] == "categories"} == {
        ("categories", "adversarial"),
        ("categories", "random"),
    }


def test_a_photograph_of_which_nothing_stands_out_has_no_mask(clients, capsys):
    path = clients / "package/usr/share/gcompris-qt/rcc/erase.rcc"
    dark = {"r/pig.webp": webp(color="black"), "r/README": b"License: CC0\nFiles: pig.webp"}
    path.write_bytes(qt_archive(dark))
    main(["--output", str(clients / "photographs"), "--foreground"])
    assert "5 photographs of 5 names, 4 with a foreground\n" in capsys.readouterr().out
    rows = load_own(clients / "photographs/questions.jsonl", strict=True)
    assert [bool(row["guidance"]) for row in rows if "pig" in row["id"]] == [False] * 4
    assert not (clients / "photographs/masks/erase").exists()


def test_names_of_training_are_told_apart(clients, cutouts):
    out = clients / "photographs"
    entries, questions = fetch_photographs(out, cutouts=cutouts)
    source = CutoutSource(cutouts)
    train = set(make_pools(source.kinds, source.colors)["train"].names)
    assert train & {"cat", "horse", "giraffe", "swan"}
    assert all(entry["styles"] == (("photo",) if entry["name"] in train else ()) for entry in entries)
    seen = {row["question"].split(" ", 3)[3]: row["category"].split(", ")[1] for row in questions}
    assert {seen[f"{name} in the image?"] for name in train if f"{name} in the image?" in seen} == {"seen name"}
    assert seen["komodo dragon in the image?"] == seen["red panda in the image?"] == "unseen name"


def test_scenes_that_show_some_of_the_cutouts_narrow_the_names_of_training(cutouts, tmp_path):
    shown = ["cat", "hammer", "key", "bus", "car", "saw", "plum", "pear"]
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/scenes.json").write_text(json.dumps({"names": shown}))
    things, trained = read_names(cutouts, tmp_path / "scenes")
    assert "cat" not in things and set(trained) <= set(shown) and len(trained) == 6
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "out"), "--scenes", str(tmp_path / "scenes")])


@pytest.mark.parametrize("content", [None, "{}", '{"names": []}', "[]", "{"])
def test_scenes_that_are_none_are_refused(cutouts, tmp_path, content):
    (tmp_path / "scenes").mkdir()
    if content is not None:
        (tmp_path / "scenes/scenes.json").write_text(content)
    with pytest.raises(ValueError, match=r"scenes\.json"):
        read_names(cutouts, tmp_path / "scenes")


ENTRIES = [{"file": f"erase/{name}.webp", "name": name} for name in NAMES]


@pytest.mark.parametrize("trained", [None, {"cat": (), "giraffe": (), "horse": (), "key": (), "bus": ()}])
def test_questions_are_balanced_and_name_nothing_that_is_there(trained):
    things = ["key", "bus", "hammer", "cello"]
    for seed in range(20):
        rows = list(ask(ENTRIES, things, trained, seed))
        assert rows == list(ask(ENTRIES, things, trained, seed))
        counts = Counter((row["image"], row["category"], row["answer"]) for row in rows)
        assert set(counts.values()) == {1} and len(counts) == 4 * len(NAMES)
        for row in rows:
            name = row["image"].removeprefix("erase/").removesuffix(".webp")
            asked = row["question"].removeprefix("Is there a").removeprefix("n").split(" in the image")[0].strip()
            same = synonym_group(asked) == synonym_group(name)
            assert same == (row["answer"] == "yes") == (asked == name)
            assert (asked in things) == ("random" in row["category"] and not same)
            if trained is not None:
                assert ("unseen" not in row["category"]) == (asked in trained) == (name in trained)
        assert [row["id"] for row in rows[:2]] == ["erase-cat-adversarial-yes", "erase-cat-adversarial-no"]
    other = [row["question"] for row in ask(ENTRIES, things, trained, 21)]
    assert other != [row["question"] for row in rows]
    added = list(ask([*ENTRIES, {"file": "erase/goat.webp", "name": "cat"}], things, trained, 21))
    assert [row["question"] for row in added[: len(rows)]] == other  # a photograph more changes no other's questions


@pytest.mark.parametrize(
    ("names", "things", "trained", "category"),
    [(["cat", "kitten"], ["key"], None, "adversarial"), (["cat", "owl"], [], None, "random"),
     (["cat", "owl", "cow"], ["key"], {"owl": (), "cow": ()}, "adversarial, unseen name"),
     (["cat", "owl"], ["key"], {"owl": (), "cat": ()}, "random, seen name")],
)  # fmt: skip
def test_nothing_to_ask_for_is_an_error(names, things, trained, category):
    entries = [{"file": f"erase/{name}.webp", "name": name} for name in names]
    with pytest.raises(ValueError, match=rf"no name is left to ask erase/.* for \({category}\)"):
        list(ask(entries, things, trained, 0))


def test_clean_names():
    for place, name in {
        "erase/red_panda": "red panda", "erase/camels": "camel", "explore_world_animals/chameleon": "lizard",
        "erase/chamaeleon": "chameleon", "erase/flying_fox": "bat", "erase/some_grapes": None, "erase/cats": None,
    }.items():  # fmt: skip
        assert photograph_name(place) == name
    assert synonym_group("kitten") == "cat" and synonym_group("komodo dragon") == synonym_group("chameleon")


def test_names_without_cutouts_are_things_of_the_icons():
    things, trained = read_names(None)
    assert trained is None and "hammer" in things and not {"cat", "tree", "house", "hand"} & set(things)


def test_rights_stand_in_any_order_and_on_any_line():
    found = read_rights("Files: a.webp, b.webp\n  c.webp\nLicense:  CC0\n\n\nLicense: MIT\n\nFiles:\nd.webp\n")
    assert found == {**{f"{name}.webp": {"license": "CC0"} for name in "abc"}, "d.webp": {}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "erase.rcc").unlink(), r"gcompris-qt-data has no erase\.rcc"),
        (lambda folder: (folder / "erase.rcc").write_bytes(b"qres" + bytes(90)), r"erase\.rcc cannot be read"),
        (lambda folder: (folder / "erase.rcc").write_bytes(archive_of("erase", "cat", "pig", readme="Files: {0}")),
         r"erase\.rcc: no README gives a license for .*/cat\.webp"),
        (lambda folder: (folder / "../../../../../bin/apt-get").write_text("#!/bin/sh\necho none >&2\nexit 5"),
         "apt-get download gcompris-qt-data` failed with status 5: none"),
        (lambda folder: write_weights(folder / "../../../../../imgly-background-removal-data-1.4.5.tgz", b"x"),
         r"imgly-.*\.tgz has \d+ bytes of weights, not \d+; delete it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_left(clients, damage, message):
    damage(clients / "package/usr/share/gcompris-qt/rcc")
    with pytest.raises(ValueError, match=message):
        fetch_photographs(clients / "photographs", foreground=True)
    assert not [path for path in clients.iterdir() if "photographs" in path.name]


def test_a_picture_that_is_none_is_refused(tmp_path):
    path = tmp_path / "erase.rcc"
    path.write_bytes(qt_archive({"r/cat.webp": webp()[:50], "r/README": b"License: CC0\nFiles: cat.webp"}))
    with pytest.raises(ValueError, match=r"erase\.rcc: photograph r/cat\.webp: the picture cannot be decoded"):
        list(read_photographs(path))


def test_a_missing_runtime_is_said_before_anything_is_fetched(clients, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        fetch_photographs(clients / "photographs", foreground=True)
    assert not (clients / "log").exists()
