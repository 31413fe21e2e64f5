"""Own pictures, texts and masks become a data set that training reads, whatever form they come in."""

import base64
import csv
import json

import numpy as np
import pytest
from bad_rows import encoded, photo, turns
from PIL import Image

from agevlm.data.cli import check
from agevlm.data.masks import join_masks, masks_of
from agevlm.data.rows import open_row
from agevlm.data.tables import load_table
from agevlm.grounding import cli
from agevlm.grounding.annotations import read_annotations
from agevlm.grounding.import_data import import_data, part_of
from agevlm.grounding.masks import from_segmentation
from agevlm.store import read_json, write_json


SIZE, BOX = (64, 48), (8, 6, 40, 30)  # the object is a rectangle, so that a box says the same as its mask
EXACT = np.zeros(SIZE[::-1], dtype=bool)
EXACT[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
CORNERS = [BOX[0], BOX[1], BOX[2], BOX[1], BOX[2], BOX[3], BOX[0], BOX[3]]
CAPTION = "A dog and two cats."
IMAGE = {"id": 7, "file_name": "a.jpg", "width": SIZE[0], "height": SIZE[1]}


def make(source, out, **options):
    return import_data(source, out, progress=False, **options)


def runs(mask):
    """COCO's run lengths, by their definition."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()


def coco(folder, *segmentations):
    annotations = [{"id": n, "image_id": 7, "category_id": 1, **found} for n, found in enumerate(segmentations)]
    write_json(
        folder / "c.json",
        {"images": [IMAGE], "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]},
    )


def compressed(folder):
    pytest.importorskip("pycocotools", reason="needs the extra coco")
    from agevlm.grounding.masks import to_rle

    coco(folder, {"segmentation": to_rle(EXACT)})


def labelme(folder, points, kind="polygon", **fields):
    shape = {"label": "dog", "points": points, "shape_type": kind, **fields}
    content = {"imagePath": "..\\photos\\a.jpg", "imageWidth": SIZE[0], "imageHeight": SIZE[1], "shapes": [shape]}
    write_json(folder / "a.json", content)


def saved(values, mode="L", name="a", **options):
    def save(folder):
        image = Image.fromarray(values) if mode in ("L", "RGBA", "I;16") else Image.fromarray(values, "L")
        if mode == "P":
            image = image.convert("L")
            image = Image.frombytes("P", image.size, image.tobytes())
            image.putpalette(options["palette"])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}.png")

    return save


LEVELS = EXACT.astype(np.uint8)
NUMBERS = LEVELS * 3
NUMBERS[10:20, 10:20] = 5  # of another class
NUMBERS[0] = 255  # a border
LEFT = LEVELS * (np.arange(SIZE[0]) < 20).astype(np.uint8)
ALPHA = np.dstack([np.full((*EXACT.shape, 3), 90, np.uint8), LEVELS * 255])
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, *[200] * 750]  # begins as Pascal VOC's

FORMS = {
    "run lengths": lambda folder: coco(folder, {"segmentation": {"size": list(EXACT.shape), "counts": runs(EXACT)}}),
    "run lengths, compressed": compressed,
    "polygon": lambda folder: coco(folder, {"segmentation": [CORNERS]}),
    "two annotations": lambda folder: coco(
        folder, *({"bbox": [left, 6, 16, 24], "segmentation": []} for left in (8, 24))
    ),
    "box": lambda folder: coco(folder, {"bbox": [8, 6, 32, 24]}),
    "labelme polygon": lambda folder: labelme(folder, [[8, 6], [40, 6], [40, 30], [8, 30]]),
    "labelme rectangle": lambda folder: labelme(folder, [[40, 30], [8, 6]], "rectangle"),
    "labelme mask": lambda folder: labelme(
        folder,
        [[8, 6], [39, 29]],
        "mask",
        mask=base64.b64encode(encoded(Image.new("L", (32, 24), 255))).decode(),
    ),
    "PNG 0/1": saved(LEVELS),
    "PNG 0/255": saved(LEVELS * 255),
    "PNG of 16 bits": saved(LEVELS.astype(np.uint16)),
    "PNG of numbers": saved(NUMBERS),
    "PNG of two objects": saved(LEFT * 38 + (LEVELS - LEFT) * 175),
    "PNG of two objects, one white": saved(LEFT * 40 + (LEVELS - LEFT) * 255),
    "PNG of two objects, of 16 bits": saved(LEFT * np.uint16(1000) + (LEVELS - LEFT) * np.uint16(2000)),
    "PNG with a palette": saved(LEVELS, "P", palette=[255, 255, 255, 0, 0, 0]),
    "PNG with a palette of classes": saved(NUMBERS, "P", palette=VOC),
    "PNG with alpha": saved(ALPHA, "RGBA"),
    "one PNG per object": lambda folder: [
        saved(part, name=name)(folder)
        for part, name in (
            (LEVELS * (np.arange(SIZE[0]) < 20), "a_dog_1"),
            (LEVELS * (np.arange(SIZE[0]) >= 20), "a_2"),
        )
    ],
    "PNG in a folder": saved(LEVELS, name="a/dog"),
    "boxes": lambda folder: (folder / "b.csv").write_text("image,label,xmin,ymin,xmax,ymax\na.jpg,dog,8,6,40,30\n"),
}


@pytest.fixture
def photos(tmp_path):
    """Two photographs, and rows of captions and questions about them as CSV."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate("ab"):
        photo(number, SIZE).save(folder / f"{name}.jpg")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        lines = [("a.jpg", CAPTION, "", ""), ("b.jpg", "Nothing.", "", ""), ("a.jpg", "", "Is there a dog?", "Yes")]
        csv.writer(file).writerows([("image", "caption", "question", "answer"), *lines])
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_mask_gives_the_same_bits(photos, form):
    (photos / "masks").mkdir()
    FORMS[form](photos / "masks")
    report = make(photos / "rows.csv", photos / "data", images=[photos / "photos"], masks=[photos / "masks"])
    found = masks_of(photos / "data", "captions")
    assert found["query"] == [CAPTION] and found["message_index"] == [1]
    wanted = EXACT & (NUMBERS != 255) if "classes" in form or "numbers" in form else EXACT
    assert (np.array(found[0]["mask"]) == wanted).all()
    assert not report["unused_masks"] and report["rows_without_mask"][0]["row"] == "row-2"
    labeled = not form.startswith("PNG") or "folder" in form
    assert report["masks"] == {"captions": 1, "instructions": 1}
    assert report["phrases"]["captions"] == labeled == report["phrases"]["instructions"]


def test_a_polygon_holds_the_pixels_whose_center_is_inside():
    from matplotlib.path import Path as Outline

    rng = np.random.default_rng(0)
    columns, rows = np.meshgrid(np.arange(30) + 0.5, np.arange(20) + 0.5)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = np.stack([15 + 18 * np.cos(angles), 10 + 12 * np.sin(angles)], 1)  # it leaves the picture
        drawn = from_segmentation([points.ravel().tolist()], (30, 20))
        inside = Outline(points).contains_points(np.stack([columns.ravel(), rows.ravel()], 1)).reshape(20, 30)
        assert (drawn == inside).all() and 0 < drawn.sum() < 600


def test_an_import_is_a_data_set_for_both_stages(photos, capsys):
    coco(photos, {"segmentation": [CORNERS]}, {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "category_id": 2})
    content = read_json(photos / "c.json")
    content["categories"].append({"id": 2, "name": "cat"})
    content["images"].append({"id": 8, "file_name": "x.jpg", "width": 9, "height": 9})
    content["annotations"] += [
        {"id": 5, "image_id": 8, "bbox": [0, 0, 3, 3]}, {"id": 6, "image_id": 9}, {"id": 7, "image_id": 7},
        {"id": 8, "image_id": 7, "bbox": [70, 0, 3, 3]},
    ]  # fmt: skip
    write_json(photos / "c.json", content)
    with (photos / "rows.csv").open("a") as file:
        file.write("a.jpg,A cat, a dog,,\nc.jpg,A cat.,,\n")
    command = [str(photos / "rows.csv"), "--images", str(photos / "photos"), "--masks", str(photos / "c.json"),
               "--output", str(photos / "data")]  # fmt: skip
    cli.import_data(command)
    told = capsys.readouterr().out
    assert "2 captions: 1 with a mask, 2 phrases" in told and "1 instructions: 1 with a mask, 1 phrases" in told
    assert "2 rows dropped:" in told and "a line with more fields than the header" in told
    assert "no row shows 'x.jpg'" in told and "image_id 9 is the id of no image" in told
    assert "annotation 7: a segmentation is a list" in told and "annotation 8: it covers nothing" in told
    train = f"agevlm train stage3_ground --data {photos / 'data'} --mask-fraction 1"
    next_command = f"{train} --init-from CHECKPOINT --output-dir RUN"
    assert told.splitlines()[-1] == f"written to {photos / 'data'}; next: {next_command}"
    assert Image.open(photos / "data" / "contact_sheet.png").width > 500
    report = read_json(photos / "data" / "import.json")
    assert [len(report[name]) for name in ("unused_masks", "rows_without_mask", "dropped_rows")] == [4, 1, 2]
    for part, wanted in (("captions", ["dog", "cats"]), ("instructions", ["dog"])):
        rows = load_table(str(photos / "data" / part))
        for by_phrase in (False, True):
            joined = join_masks(rows, masks_of(photos / "data", part, by_phrase))
            guidance = open_row(joined[0])["guidance"]
            mask = np.logical_or.reduce([np.array(phrase["mask"]) for phrase in guidance])
            assert mask.sum() == EXACT.sum() + 16 * (part == "captions")
        assert [phrase["query"] for phrase in guidance] == wanted
    before = (photos / "data" / "import.json").stat().st_mtime_ns
    cli.import_data(command)
    assert capsys.readouterr().out == told and (photos / "data" / "import.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"holds another import .*part: None there, 'captions' asked"):
        cli.import_data([*command, "--part", "captions"])
    with pytest.raises(ValueError, match=r"row 4 .*more fields than the header"):
        cli.import_data([*command[:-1], str(photos / "other"), "--strict"])
    assert not (photos / "other").exists() and not (photos / ".other.incomplete").exists()


def beside(folder):
    for name in "ab":
        (folder / f"{name}.txt").write_text(CAPTION)
    return folder


def metadata(folder):
    (folder / "metadata.jsonl").write_text("".join(f'{{"file_name": "{n}.jpg", "text": "{CAPTION}"}}\n' for n in "ab"))
    return folder


def semicolons(folder):
    (folder / "metadata.csv").write_text(f"\ufefffile_name;text\na.jpg;{CAPTION}\nb.jpg;{CAPTION}\n")
    return folder


def llava(folder):
    asked = "<image>\nProvide a brief description of the given image."
    write_json(
        folder / "rows.json", [{"id": n, "image": f"{n}.jpg", "conversations": turns(asked, CAPTION)} for n in "ab"]
    )
    return folder / "rows.json"


def messages(folder):
    text = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": CAPTION}]
    rows = [{"images": [f"{n}.jpg"], "messages": text} for n in "ab"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("form", [beside, metadata, semicolons, llava, messages])
def test_every_form_of_captions_gives_the_same_rows(photos, form):
    source = form(photos / "photos")
    report = make(source, photos / "data")
    assert report["rows"] == {"captions": 2, "instructions": 0} and not report["dropped_rows"]
    rows = load_table(str(photos / "data" / "captions"))
    assert [row["messages"][1]["content"] for row in rows] == [CAPTION] * 2
    assert rows[0]["images"][0].tobytes() == Image.open(photos / "photos" / "a.jpg").tobytes()
    check([str(photos / "data" / "captions"), "--workers", "1", "--strict"])


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("", "captions"),
        ("Write a terse but informative summary of the picture.", "captions"),
        ("What is this?", "instructions"),
        ("Can you describe it?", "instructions"),
        ("Is there a cat? Answer yes or no.", "instructions"),
    ],
)
def test_the_part_of_a_row(asked, part):
    row = [{"role": "user", "content": f"<|image|>{asked}"}, {"role": "assistant", "content": "A cat."}]
    assert part_of(row) == part and part_of(row * 2) == "instructions"


def test_masks_find_their_rows_by_names_and_ids(photos):
    """By path, its end, its stem, or the row's id; what several pictures could mean is no one's."""
    for number, folder in enumerate("cd"):
        (photos / "photos" / folder).mkdir()
        photo(3 + number, SIZE).save(photos / "photos" / folder / "e.png")
    shown = ["a.jpg", "b.jpg", "c/e.png", "d/e.png"]
    rows = [{"id": f"r{n}", "image": name, "caption": "A dog."} for n, name in enumerate(shown)]
    write_json(photos / "photos" / "rows.json", rows)
    names = ["train/a.jpg", "e.png", "b.jpeg", "r1", "a", "x/d/e.jpg"]
    (photos / "b.csv").write_text("image,label,xmin,ymin,xmax,ymax\n" + "".join(f"{n},dog,0,0,4,4\n" for n in names))
    report = make(photos / "photos" / "rows.json", photos / "data", masks=[photos / "b.csv"])
    assert masks_of(photos / "data", "captions")["id"] == ["r0", "r1", "r3"]
    (unused,) = report["unused_masks"]
    assert unused["mask"].endswith("line 3")
    assert unused["reason"] == "'e.png' may be 'c/e.png' or 'd/e.png'; give it their folder"


@pytest.mark.parametrize(("images", "annotation", "told"), [
    ([IMAGE], {"image_id": 9}, "image_id 9 is the id of no image"),
    ([IMAGE], {"image_id": "7"}, "image_id '7' is the id of no image"),
    (["a.png"], {}, "images hold 'a.png', expected objects"),
    ({"7": IMAGE}, {}, "with the lists"),
    ([{**IMAGE, "id": None}], {}, "the field id of .* is None"),
    ([IMAGE, IMAGE], {}, "images repeat an id"),
    ([{**IMAGE, "width": "10"}], {}, "the field width of .* is '10'"),
    ([{**IMAGE, "width": 10**7, "height": 10**7}], {}, "a mask of 10000000 x 10000000 on a picture of 64 x 48"),
    ([IMAGE], {"category_id": []}, "the field category_id of"),
    ([IMAGE], {"message_index": "x"}, "the field message_index of .* is 'x'"),
    ([IMAGE], {"segmentation": {"size": [48, 64], "counts": "0"}}, "annotation 0: run lengths"),
    ([IMAGE], {"segmentation": {"size": [48, 65], "counts": [1]}}, "annotation 0: a segmentation of 65 x 48"),
    ([IMAGE], {"segmentation": [[1, 1, 2, 2]]}, "annotation 0: it covers nothing"),
    ([IMAGE], {"segmentation": [[90, 90, 99, 90, 99, 99]]}, "annotation 0: it covers nothing"),
    ([IMAGE], {"segmentation": [], "bbox": [1, 2, 3]}, "annotation 0: a bbox is"),
    ([IMAGE], {"segmentation": [], "bbox": [9, 9, -3, 3]}, "annotation 0: the bbox .* has a negative width"),
    ([IMAGE], {"query": "A cow", "message_index": 1}, "'A cow' is not in message 1 of its row"),
])  # fmt: skip
def test_what_is_wrong_with_a_coco_file_is_named(photos, images, annotation, told):
    annotation = {"image_id": 7, "segmentation": [CORNERS], **annotation}
    write_json(photos / "c.json", {"images": images, "annotations": [annotation]})
    with pytest.raises(ValueError, match=f"c.json.*{told}"):
        make(photos / "rows.csv", photos / "data", images=[photos / "photos"], masks=[photos / "c.json"])


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("c.json", "[]", "neither a COCO file"),
        ("c.json", "{", "no valid JSON"),
        ("c.csv", "image,label,xmin\na.jpg,dog,1\n", "lacks the column ymin, xmax, ymax"),
        ("c.csv", "image,label,xmin,ymin,xmax,ymax\nz.jpg,dog,1,1,9,9\n", "1 of 1 masks guide no row.*'z.jpg'"),
        ("c.csv", "image,label,xmin,ymin,xmax,ymax\na.jpg,dog,1,1,x,9\n", "'x' is no number of pixels"),
        ("c.csv", "image,label,xmin,ymin,xmax,ymax\na.jpg,dog,1,5,2,5,9,5,9,5\n", "more fields than the header"),
        ("c.csv", "image,label,xmin,ymin,xmax,ymax\na.jpg,dog,30,30,10,10\n", "ends before it begins"),
        ("c.csv", "image,label,xmin,ymin,xmax,ymax\na.jpg,dog,0.1,0.1,0.9,0.9\n", "shares of the picture"),
        ("c.csv", "image,label,xmin,ymin,xmax,ymax\n", "holds no masks"),
        ("c.json", '{"images": [], "annotations": []}', "holds no masks"),
        ("c.txt", "", "is no file of masks"),
        ("nothing/README.md", "", "holds no masks"),
    ],
)
def test_masks_of_no_use_are_refused_and_leave_nothing(photos, file, content, told):
    (photos / file).parent.mkdir(exist_ok=True)
    (photos / file).write_text(content)
    place = photos / file if "/" not in file else photos / "nothing"
    with pytest.raises(ValueError, match=told):
        make(photos / "rows.csv", photos / "data", images=[photos / "photos"], masks=[place])
    assert not (photos / "data").exists() and not (photos / ".data.incomplete").exists()


def test_a_mask_that_cannot_be_drawn_is_listed_with_the_reason(photos):
    (photos / "masks").mkdir()
    saved(LEVELS)(photos / "masks")
    saved(LEVELS[:-1], name="a_1")(photos / "masks")
    saved(np.arange(64 * 48).reshape(48, 64).astype(np.uint8) % 3 + 60, name="a_2")(photos / "masks")
    (photos / "masks" / "d.json").write_text("{}")
    labelme(photos / "masks", [[1, 1], [5, 5]], "line")
    report = make(photos / "rows.csv", photos / "data", images=[photos / "photos"], masks=[photos / "masks"])
    known = ("no area", "64 x 47 on", "neither a COCO", "the values")
    reasons = [item["reason"] for item in report["unused_masks"]]
    assert sorted(part for part in known for reason in reasons if part in reason) == sorted(known)
    assert len(read_annotations([photos / "masks"])) == 5
    with pytest.raises(ValueError, match="4 of 5 masks guide no row"):
        make(photos / "rows.csv", photos / "strict", images=[photos / "photos"], masks=[photos / "masks"], strict=True)


def test_pictures_among_the_masks_are_no_masks(photos):
    """Nor is a picture of colored classes: its darker ones would be lost."""
    folder = photos / "photos"
    scene = Image.fromarray(LEVELS * 255).convert("RGB")
    for name in ("a", "b"):
        scene.save(folder / f"{name}.png")
    photo(3, SIZE).save(folder / "c.png")
    classes = np.dstack([NUMBERS, NUMBERS // 5, LEVELS]) * 50
    saved(LEVELS, name="a_mask")(folder)
    saved(LEVELS, name="c_2")(folder)
    Image.fromarray(classes).save(folder / "b_1.png")
    (photos / "rows.csv").write_text('image, caption\na.png, "A dog, or a cat"\nb.png, A dog\nc.png, A dog\n')
    report = make(photos / "rows.csv", photos / "data", images=[folder], masks=[folder])
    told = {item["mask"].rsplit("/", 1)[-1]: item["reason"] for item in report["unused_masks"]}
    assert sorted(told) == ["a.png", "b.png", "b_1.png", "c.png"]
    assert told["a.png"] == told["b.png"] == told["c.png"] == "it is the picture itself"
    assert "several colors" in told["b_1.png"]
    masks = masks_of(photos / "data", "captions")
    assert masks["id"] == ["row-1", "row-3"] and masks["query"][0] == "A dog, or a cat"


@pytest.mark.parametrize(("shown", "masked"), [
    ("Ko\u0308ln (1).jpg", "K\u00f6ln (1)_mask.png"),  # as macOS and others write a name
    ("sub/a b.JPG", "sub\\a b.jpg"),  # a Windows path
])  # fmt: skip
def test_names_of_other_systems_are_found(photos, shown, masked):
    folder = photos / "own"
    (folder / shown).parent.mkdir(parents=True)
    photo(0, SIZE).save(folder / shown)
    (folder / shown).with_suffix(".TXT").write_text("A dog.\r\n", encoding="utf-8-sig")
    masks = photos / "masks"
    masks.mkdir()
    if masked.endswith(".png"):
        saved(LEVELS, name=masked[:-4])(masks)
    else:
        (masks / "b.csv").write_text(f"image,label,xmin,ymin,xmax,ymax\n{masked},dog,8,6,40,30\n")
    report = make(folder, photos / "data", masks=[masks])
    assert report["masks"]["captions"] == 1 and masks_of(photos / "data", "captions")["query"] == ["A dog."]


def test_a_finished_import_is_whole_and_lies_outside_of_what_it_reads(photos):
    (photos / "masks").mkdir()
    saved(LEVELS, name="a_dog")(photos / "masks")
    command = {"images": [photos / "photos"], "masks": [photos / "masks"]}
    report = make(photos / "rows.csv", photos / "data", **command)
    assert make(photos / "rows.csv", photos / "data", **command) == report
    for file in sorted((photos / "data").rglob("*.parquet")):
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name} is missing or damaged.*delete .* to import again"):
            make(photos / "rows.csv", photos / "data", **command)
        file.write_bytes(content)
    for source, masks in ((photos / "rows.csv", photos / "masks"), (photos / "masks", photos / "photos")):
        with pytest.raises(ValueError, match=r"data lies in .*masks, of which all files are read"):
            make(source, photos / "masks" / "data", images=[photos / "photos"], masks=[masks])


def test_a_table_of_other_columns_tells_them(photos):
    (photos / "rows.csv").write_text("picture,desc\na.jpg,A dog.\n")
    with pytest.raises(ValueError, match=r"no row of rows.csv is good .*row 1: the row has the fields picture, desc"):
        make(photos / "rows.csv", photos / "data", images=[photos / "photos"])


def test_a_turned_photograph_takes_the_mask_of_what_is_seen(photos):
    """EXIF turns it by a quarter: the mask of the picture as it lies in the file is refused."""
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(0, SIZE).save(photos / "photos" / "a.jpg", exif=turned)
    (photos / "masks").mkdir()
    saved(LEVELS.T)(photos / "masks")
    saved(LEVELS, name="a_1")(photos / "masks")
    report = make(photos / "rows.csv", photos / "data", images=[photos / "photos"], masks=[photos / "masks"])
    (unused,) = report["unused_masks"]
    assert "a mask of 64 x 48 on a picture of 48 x 64" in unused["reason"] and "upright" in unused["reason"]
    row = join_masks(load_table(str(photos / "data" / "captions")), masks_of(photos / "data", "captions"))[0]
    assert (np.array(open_row(row)["guidance"][0]["mask"]) == EXACT.T).all()


@pytest.mark.parametrize(
    "text", ["image,caption\nb.jpg,A dog.\na.jpg,Caf\xe9\n", "image,caption,\xe9\nb.jpg,A dog.,\na.jpg,,\n"]
)
def test_text_that_is_no_utf8_costs_its_row(photos, text):
    (photos / "rows.csv").write_bytes(text.encode("latin-1"))
    report = make(photos / "rows.csv", photos / "data", images=[photos / "photos"])
    assert report["rows"]["captions"] == 1 and [row["row"] for row in report["dropped_rows"]] == [2]
