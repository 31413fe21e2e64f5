"""The command line from end to end, the page, quality, COCO, and which text of a row is grounded."""

import json

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from agevlm.data.masks import join_masks
from agevlm.data.queries import find_name, find_query
from agevlm.data.rows import MASK_FEATURES, PHRASE_FEATURES, ROW_FEATURES, open_row
from agevlm.data.tables import load_table
from agevlm.grounding import cli as ground
from agevlm.grounding.import_data import import_masks
from agevlm.grounding.masks import boundary_f, iou, to_png
from agevlm.grounding.output import read_masks
from agevlm.grounding.quality import compare, load_masks, measure_quality
from agevlm.processing import AgeVlmImageProcessorPil
from agevlm.store import write_json


GRID = AgeVlmImageProcessorPil(size={"height": 96, "width": 96})
NASTY = "<script>alert('x')</script> & a red apple"


@pytest.fixture
def files(tmp_path, write_files):
    """Eight rows with a query that must be escaped, and exact masks of seven of them."""
    boxes = [None if number == 3 else (5, 5, 20 + number, 30) for number in range(8)]
    return tmp_path, *write_files([NASTY] * 8, [(50, 40 + number) for number in range(8)], boxes)


def test_the_command_line_from_rows_to_page_quality_and_coco(files, capsys):
    folder, rows, masks = files
    out = folder / "out"
    command = [rows, str(out), "--backend", "exact", "--masks", masks, "--keep", "5", "--num-workers", "0"]
    ground.ground(command)
    assert "5 masks kept of 8 rows attempted" in capsys.readouterr().out
    before = (out / "data" / "kept.parquet").stat().st_mtime_ns
    ground.ground([*command[:-4], "--keep", "9"])
    told = capsys.readouterr()
    assert "7 masks kept" in told.out and "2 fewer than asked for" in told.err
    assert (out / "data" / "kept.parquet").stat().st_mtime_ns != before

    ground.view([str(out)])
    page = (out / "view.html").read_text()
    assert page.count('<section class="row"') == 8 and page.count("data:image/jpeg;base64,") == 3 * 7 + 1
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing to fetch

    ground.quality([str(out), "--against", masks, "--output", str(folder / "quality.json")])
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["compared"] == quality["masks"] == 7
    assert all(quality[name]["mean"] == 1 for name in ("iou", "boundary_f", "grid_iou"))

    pytest.importorskip("pycocotools", reason="needs the extra coco")
    ground.export_coco([str(out), str(folder / "coco.json")])
    ground.import_coco([str(folder / "coco.json"), str(folder / "back.parquet"), "--rows", rows])
    assert "`agevlm ground import` is now `agevlm data import`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give the rows that they belong to, --rows ROWS"):
        ground.import_coco([str(folder / "coco.json"), str(folder / "back.parquet")])
    kept, back = read_masks(out), load_table(str(folder / "back.parquet"))
    assert back["id"] == kept["id"] and back["query"] == kept["query"]
    for one, two in zip(kept["mask"], back["mask"], strict=True):
        assert one.mode == two.mode == "1" and one.tobytes() == two.tobytes()
    annotation = json.loads((folder / "coco.json").read_text())["annotations"][0]
    assert annotation["area"] == np.array(kept[0]["mask"]).sum() and annotation["bbox"] == [5, 5, 15, 25]


def test_rows_with_guidance_bring_their_masks(files):
    folder, rows, masks = files
    ground.ground([rows, "--output", str(folder / "out"), "--backend", "exact", "--masks", masks])
    kept = read_masks(folder / "out").select_columns(list(MASK_FEATURES))
    joined = join_masks(load_table(rows), kept)
    joined.to_parquet(folder / "joined.parquet")
    ground.ground([str(folder / "joined.parquet"), "--output", str(folder / "again"), "--backend", "exact"])
    again = read_masks(folder / "again")
    assert again["id"] == kept["id"]
    assert [m.tobytes() for m in again["mask"]] == [m.tobytes() for m in kept["mask"]]


PIECE = [[0, 0, 4, 0, 4, 4, 0, 4]]
IMAGE = {"id": 7, "file_name": "a", "width": 10, "height": 8}


def shown(name, place, text):
    """A row that shows the picture of this place."""
    images = [{**to_png(np.zeros((8, 10), dtype=bool)), "path": place}]
    turns = [{"role": "user", "content": "<|image|>Who?"}, {"role": "assistant", "content": text}]
    return {"id": name, "images": images, "messages": turns}


def test_masks_of_a_foreign_file_join_the_rows_that_show_the_pictures(tmp_path):
    def row(name, place):
        return shown(name, place, f"A cat {name}.")

    rows = Dataset.from_list(
        [row("r1", "coco/a"), row("r2", "coco/a"), row("r3", "b"), row("a.c", None)], features=ROW_FEATURES
    )
    path, out = tmp_path / "c.json", tmp_path / "masks.parquet"
    other = {**IMAGE, "id": 8, "file_name": "a.c"}  # the id of a row whose picture has no name
    pieces = [
        {"image_id": 7, "segmentation": PIECE},
        {"image_id": 7, "segmentation": {"size": [8, 10], "counts": [72, 8]}},
        {"image_id": 8, "segmentation": PIECE},
    ]
    write_json(path, {"images": [IMAGE, other], "annotations": pieces})
    assert import_masks([path], rows, out) == {"written": 3}
    joined = join_masks(rows, load_table(str(out)))
    assert [found and found["query"] for found in joined["guidance"]] == ["A cat r1.", "A cat r2.", None, "A cat a.c."]
    assert [np.array(open_row(found)["guidance"][0]["mask"]).sum() for found in joined.select([0, 3])] == [24, 16]
    with pytest.raises(ValueError, match="none of the masks guides a row; no row shows 'a'"):
        import_masks([path], rows.select([2]), tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def by_phrase_set(named, size=(10, 8)):
    """A set of masks by phrase: (id, words, occurrence, left end of a mask of 3 x 4 pixels)."""
    found = []
    for row_id, query, occurrence, left in named:
        mask = Image.new("1", size)
        mask.paste(1, (left, 2, left + 3, 6))
        found.append({"id": row_id, "query": query, "message_index": 1, "mask": mask, "source": "x", "score": 1.0,
                      "occurrence": occurrence})  # fmt: skip
    return Dataset.from_list(found, features=PHRASE_FEATURES)


PHRASES = [("r1", "A cat", 0, 0), ("r1", "cat", 1, 4), ("r2", "A cat", 0, 6)]


def test_phrases_pass_through_page_quality_and_coco(tmp_path, write_files):
    pytest.importorskip("pycocotools", reason="needs the extra coco")
    rows, _ = write_files(["", "A cat and a cat", "A cat"], [(10, 8)] * 3, [None] * 3)
    masks, out = str(tmp_path / "phrases.parquet"), str(tmp_path / "out")
    by_phrase_set(PHRASES).to_parquet(masks)
    ground.ground([rows, "--output", out, "--backend", "exact", "--masks", masks, "--by-phrase", "--max-area", "1"])
    ground.view([out])
    page = (tmp_path / "out" / "view.html").read_text()
    assert page.count('<section class="row"') == 3 and page.count('<div class="query">') == 4
    ground.quality([out, "--against", masks, "--output", str(tmp_path / "q.json")])
    assert json.loads((tmp_path / "q.json").read_text())["compared"] == 3
    ground.export_coco([out, "--output", str(tmp_path / "c.json")])
    content = json.loads((tmp_path / "c.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["r1", "r2"]
    assert [item["name"] for item in content["categories"]] == ["A cat", "cat"]
    assert [(item["image_id"], item["category_id"]) for item in content["annotations"]] == [(1, 1), (1, 2), (2, 1)]
    again = [str(tmp_path / "c.json"), "--rows", rows]
    ground.import_coco([*again, "--output", str(tmp_path / "back.parquet"), "--by-phrase"])
    back, wanted = load_table(str(tmp_path / "back.parquet")), by_phrase_set(PHRASES)
    assert back.remove_columns(["mask", "source"]).to_list() == wanted.remove_columns(["mask", "source"]).to_list()
    assert all((np.array(one) == np.array(two)).all() for one, two in zip(back["mask"], wanted["mask"], strict=True))
    ground.import_coco([*again, "--output", str(tmp_path / "whole.parquet")])
    whole = load_table(str(tmp_path / "whole.parquet"))
    assert whole["query"] == ["A cat and a cat", "A cat"] and np.array(whole["mask"][0]).sum() == 24


def test_phrases_are_compared_by_their_words():
    found = by_phrase_set([("r1", "the red cat", 0, 0), ("r1", "cat", 0, 4), ("r2", "cat", 0, 0), ("r3", "cat", 0, 0)])
    exact = by_phrase_set([("r1", "cat", 0, 4), ("r1", "red cat", 0, 1), ("r2", "dog", 0, 0), ("r3", "A Cat", 0, 0)])
    result = measure_quality(found, exact, GRID, progress=False)
    assert (result["masks"], result["exact"], result["compared"]) == (4, 4, 3)
    assert result["iou"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    with pytest.raises(ValueError, match="no row with a mask in common"):
        measure_quality(found, exact.remove_columns(["occurrence"]).select([3]), GRID)


def test_categories_are_the_phrases_that_a_text_names(tmp_path):
    file, out = tmp_path / "c.json", tmp_path / "masks.parquet"
    names = ["dog", "cat", "bench", *(f"thing {number}" for number in range(9))]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    pieces = [{"image_id": 7, "category_id": number, "segmentation": PIECE} for number in (0, 1, 2, 1)]
    pieces[3]["segmentation"] = [[5, 0, 9, 0, 9, 4, 5, 4]]
    write_json(file, {"images": [IMAGE], "annotations": pieces, "categories": categories})
    texts = ["scatter two Cats; a dog", "nothing", ", ".join(names)]
    rows = Dataset.from_list(
        [shown(f"r{number}", "a", text) for number, text in enumerate(texts)], features=ROW_FEATURES
    )
    assert import_masks([file], rows, out, by_phrase=True)["written"] == 5
    joined = join_masks(rows, load_table(str(out)))
    assert [[phrase["query"] for phrase in found or []] for found in joined["guidance"]] == [
        ["dog", "Cats"], [], ["dog", "cat", "bench"],
    ]  # fmt: skip
    (dog, cats) = open_row(joined[0])["guidance"]
    assert np.array(dog["mask"]).sum() * 2 == np.array(cats["mask"]).sum() and cats["occurrence"] == 0
    write_json(file, {"images": [IMAGE], "annotations": [
        {"image_id": 7, "category_id": number, "segmentation": PIECE} for number in range(12)
    ], "categories": categories})  # fmt: skip
    assert import_masks([file], rows, out, by_phrase=True)["written"] == 2 + 8


def test_quality_is_the_mean_of_its_parts_and_refuses_strangers():
    def masks_of(ids, shift):
        arrays = [np.zeros((60, 80), dtype=bool) for _ in ids]
        for number, array in enumerate(arrays):
            array[10 + shift : 30 + shift, 10 : 40 + number] = True
        images = [Image.fromarray(array) for array in arrays]
        features = Features({"id": ROW_FEATURES["id"], "mask": ImageFeature()})
        return Dataset.from_dict({"id": ids, "mask": images}, features=features), arrays

    (found, first), (exact, second) = masks_of(["a", "b", "c"], 0), masks_of(["c", "b", "a", "x"], 3)
    result = measure_quality(found, exact, GRID, progress=False)
    pairs = list(zip(first, [second[2], second[1], second[0]], strict=True))
    assert result["masks"] == 3 and result["exact"] == 4 and result["compared"] == 3
    assert result["iou"]["mean"] == pytest.approx(np.mean([iou(*pair) for pair in pairs]))
    assert result["boundary_f"]["mean"] == pytest.approx(np.mean([boundary_f(*pair) for pair in pairs]))
    on_grid = [iou(GRID.mask_to_grid(one), GRID.mask_to_grid(two)) for one, two in pairs]
    assert result["grid_iou"]["mean"] == pytest.approx(np.mean(on_grid))
    with pytest.raises(ValueError, match="no row with a mask in common"):
        measure_quality(found, masks_of(["y"], 0)[0], GRID)
    with pytest.raises(ValueError, match="must be of one picture"):
        compare(first[0], first[0].T, GRID)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("caption", ("An apple.", "An apple.", 2)),
        ("question", ("Is it red?", "Is it red?", 1)),
        ("question+answer", ("Is it red? An apple.", "Is it red?", 1)),
    ],
)
def test_the_query_of_a_row(source, expected):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<|image|>\nIs it red?"},
        {"role": "assistant", "content": "An apple."},
        {"role": "user", "content": "And the second?"},
    ]
    text, query, index = find_query(messages, source)
    assert (text, query, index) == expected and query in messages[index]["content"]
    assert find_query([{"role": "user", "content": "<|image|>"}], source) is None
    assert find_query([], source) is None


def test_a_name_is_found_in_words_and_not_in_a_placeholder():
    row = shown("r", "a", "Two images of a cat, one image of a dog.")
    row["messages"] += [
        {"role": "user", "content": "Which image has the Cats?"},
        {"role": "assistant", "content": "It"},
    ]
    asked = find_name(row["messages"], "question+answer", "image")
    assert asked == {"query": "image", "message_index": 2, "occurrence": 0}
    row["messages"][0]["content"] = "<|image|>Which image?"
    asked = find_name(row["messages"], "question", "image")
    assert asked == {"query": "image", "message_index": 0, "occurrence": 0}
    mask = to_png(np.ones((8, 10), dtype=bool))
    open_row({**row, "guidance": {**asked, "mask": mask, "source": "x", "score": None}})
    assert find_name(row["messages"], "question+answer", "cat")["query"] == "Cats"
    assert find_name(row["messages"], "caption", "cat")["message_index"] == 1
    assert find_name(row["messages"], "question", "dog") is None


def test_what_is_no_data_set_is_said(tmp_path):
    with pytest.raises(ValueError, match="has no Parquet files"):
        load_table(str(tmp_path))
    rows = str(tmp_path / "rows.parquet")
    Dataset.from_dict({"id": ["a"], "mask": [None]}).to_parquet(rows)
    with pytest.raises(ValueError, match=r"rows\.parquet: no column images, messages"):
        ground.ground([rows, "--output", str(tmp_path / "out"), "--backend", "exact", "--masks", rows])
    with pytest.raises(ValueError, match="no complete run"):
        read_masks(tmp_path)
    assert load_masks(str(tmp_path))["id"] == ["a"]
