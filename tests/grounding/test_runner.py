"""The runner: nothing lost, exact masks stay exact through everything, failures told, kills survived, filters."""

import io
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm.data.masks import join_masks, load_masks
from agevlm.data.rows import PHRASE_FEATURES, ROW_FEATURES, find_query, open_row, undecoded
from agevlm.grounding.backends import Exact, TwoSteps
from agevlm.grounding.filters import Filters
from agevlm.grounding.journal import BatchJournal, Journals, read
from agevlm.grounding.masks import iou, mask_box, to_png
from agevlm.grounding.output import JOURNAL_FEATURES, read_masks
from agevlm.grounding.regions import Grounding
from agevlm.grounding.runner import ground
from agevlm.images import open_image
from agevlm.processing import AgeVlmImageProcessorPil


GEOMETRIES = ("pad", "stretch", "crop")
SCHEMA = JOURNAL_FEATURES.arrow_schema


def grid(geometry="pad", side=96):
    return AgeVlmImageProcessorPil(geometry=geometry, size={"height": side, "width": side})


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "TIFF" if mode in ("CMYK", "I;16", "F") else "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(row_id, image, caption="a red apple", question="<|image|>\nWhat is there?"):
    images = [] if image is None else [image]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
    return {"id": row_id, "images": images, "messages": messages}


def rows_of(rows):
    return Dataset.from_list(rows, features=ROW_FEATURES)


def exact(masks):
    """The exact backend on arrays by id."""
    ids = list(masks)
    stored = [{"mask": None if masks[i] is None else to_png(masks[i])} for i in ids]
    return lambda: Exact({row_id: [place] for place, row_id in enumerate(ids)}, stored)


def run(rows, out, backend, geometry="pad", **options):
    options = {"backend_name": "exact", "batch_size": 4, "progress": False, "filters": Filters(min_score=0), **options}
    return ground(rows, out, backend, grid=grid(geometry), **options)


class Oracle:
    """Boxes from exact masks into a segmenter of SAM's shape, which cuts out exactly the box."""

    def __init__(self, boxes):
        self.boxes = iter(boxes)

    def __call__(self, images, texts):
        return [Grounding([next(self.boxes)]) for _ in images]


def draw_boxes(boxes, size):
    drawn = np.zeros(size[::-1], dtype=bool)
    for left, top, right, bottom in boxes:
        drawn[round(top) : round(bottom), round(left) : round(right)] = True
    return drawn


def cut_out(images, boxes):
    drawn = [[draw_boxes([box], image.size) for box in row] for image, row in zip(images, boxes, strict=True)]
    return [(np.array(masks), np.ones(len(masks))) for masks in drawn]


@st.composite
def boxes_in_pictures(draw):
    width, height = draw(st.tuples(st.integers(8, 150), st.integers(8, 150)))
    left, top = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return (width, height), [left, top, right, bottom]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("path", ["exact", "oracle"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(boxes_in_pictures(), min_size=1, max_size=6))
def test_exact_masks_stay_exact_through_storage_join_geometry_and_grid(tmp_path_factory, geometry, path, drawn):
    out = tmp_path_factory.mktemp("run") / "out"
    rows = rows_of([row(f"r{number}", png(size)) for number, (size, _) in enumerate(drawn)])
    wanted = {f"r{number}": draw_boxes([box], size) for number, (size, box) in enumerate(drawn)}

    def oracle():
        return TwoSteps(Oracle([mask_box(mask) for mask in wanted.values()]), cut_out, {})

    backend = exact(wanted) if path == "exact" else oracle
    everything = Filters(min_area=0, max_area=1, min_cells=0)
    run(rows, out, backend, geometry, filters=everything)
    joined = join_masks(rows, read_masks(out))
    image_processor = grid(geometry)
    for found in joined:
        mask = np.array(open_image(found["guidance"]["mask"], found["id"], mode="1"))
        assert iou(mask, wanted[found["id"]]) == 1.0
        cells = image_processor.mask_to_grid(mask)
        assert (cells == image_processor.mask_to_grid(wanted[found["id"]])).all()
        assert found["guidance"]["query"] in found["messages"][found["guidance"]["message_index"]]["content"]


def _cell_of(pixel, size, geometry, side, cell):
    """Where the center of a pixel lies on the grid, from the geometries' definitions alone; None if cut away."""
    (row_, column), (width, height) = pixel, size
    scales = {"stretch": (side / width, side / height)}
    one = (min if geometry == "pad" else max)(side / width, side / height)
    across, down = scales.get(geometry, (one, one))
    x = (column + 0.5 - width / 2) * across + side / 2
    y = (row_ + 0.5 - height / 2) * down + side / 2
    if not (0 <= x < side and 0 <= y < side):
        return None
    return int(y // cell), int(x // cell), (y % cell, x % cell)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 300), st.integers(20, 300)),
    where=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_a_pixel_and_its_cell_map_onto_each_other(geometry, size, where):
    image_processor, (width, height) = grid(geometry), size
    pixel = (int(where[0] * height), int(where[1] * width))
    place = _cell_of(pixel, size, geometry, 96, 32)
    mask = np.zeros((height, width), dtype=bool)
    mask[pixel] = True
    cells = image_processor.mask_to_grid(mask)
    if place is None:
        return
    y, x, (down, across) = place
    margin = 2 + 96 / min(size)  # fits are rounded to whole pixels, and a pixel may lie on the line between two cells
    if min(down, across, 32 - down, 32 - across) < margin:
        return
    assert np.argwhere(cells).tolist() == [[y, x]]
    back = image_processor.grid_to_pixels(cells.astype(np.float32), (height, width))
    assert back[pixel] > 0
    peaks = np.argwhere(back >= back.max() - 1e-6)
    middle = peaks[len(peaks) // 2]
    peak_cell = _cell_of(tuple(middle), size, geometry, 96, 32)
    assert peak_cell is not None and peak_cell[:2] == (y, x)


MODES = ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F")


def test_rows_that_fail_are_told_and_the_others_are_grounded(tmp_path):
    sizes = [(1, 1), (1, 90), (90, 1), (37, 53), (64, 64), (300, 7), (31, 33), (8, 8)]
    good = {f"mode-{mode}": (png(size, mode), size) for mode, size in zip(MODES, sizes, strict=True)}
    bad = [
        row("text", None),
        row("broken", {"bytes": b"no picture", "path": None}),
        row("cut off", {"bytes": png((50, 50))["bytes"][:60], "path": None}),
        row("nothing said", png((9, 9)), caption="  "),
        row("no mask", png((9, 9))),
        row("empty mask", png((9, 9))),
        row("other size", png((9, 9))),
    ]
    masks = {row_id: np.ones(size[::-1], dtype=bool) for row_id, (_, size) in good.items()}
    masks |= {"no mask": None, "empty mask": np.zeros((9, 9), dtype=bool), "other size": np.ones((5, 5), dtype=bool)}
    rows = rows_of([*bad, *(row(row_id, image) for row_id, (image, _) in good.items())])
    summary = run(rows, tmp_path / "out", exact(masks), filters=Filters(max_area=1))
    kept = read_masks(tmp_path / "out")
    rejected = read_masks(tmp_path / "out", "rejected")
    assert kept["id"] == list(good)
    statuses = dict(zip(rejected["id"], rejected["status"], strict=True))
    assert statuses == {
        "text": "no_picture",
        "broken": "bad_picture",
        "cut off": "bad_picture" if statuses["cut off"] == "bad_picture" else "no_region",  # its size may be readable
        "nothing said": "no_query",
        "no mask": "no_region",
        "empty mask": "no_region",
        "other size": "error",
    }
    assert "5 x 5" in dict(zip(rejected["id"], rejected["detail"], strict=True))["other size"]
    assert summary["attempted"] == len(rows) == sum(summary["status"].values())
    assert summary["status"]["kept"] == len(good)


def test_strict_stops_at_the_row_and_what_came_before_is_kept(tmp_path):
    masks = {f"r{number}": np.ones((9, 9), dtype=bool) for number in range(8)}
    rows = [row(row_id, png((9, 9))) for row_id in masks]
    rows[5]["images"] = [{"bytes": b"no picture", "path": None}]
    with pytest.raises(ValueError, match="'r5': bad_picture"):
        run(rows_of(rows), tmp_path / "out", exact(masks), strict=True)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert len(Journals(tmp_path / "out" / "journal", SCHEMA).indices) == 4
    summary = run(rows_of(rows), tmp_path / "out", exact(masks), filters=Filters(max_area=1))
    assert summary["status"] == {"bad_picture": 1, "kept": 7}


def test_a_row_that_fails_in_a_model_costs_itself_alone(tmp_path):
    def segmenter(images, boxes):
        if any(image.size == (13, 13) for image in images):
            raise RuntimeError("out of memory")
        return cut_out(images, boxes)

    rows = rows_of([row(f"r{number}", png((13, 13) if number == 2 else (20, 20))) for number in range(6)])

    class Grounder:
        def __call__(self, images, texts):
            return [Grounding([[0.0, 0.0, 10.0, 10.0]]) for _ in images]

    summary = run(rows, tmp_path / "out", lambda: TwoSteps(Grounder(), segmenter, {}), batch_size=6)
    assert summary["status"] == {"error": 1, "kept": 5}
    assert "out of memory" in read_masks(tmp_path / "out", "rejected")["detail"][0]


def _many(count, side=12):
    generator = np.random.default_rng(0)
    masks = {}
    for number in range(count):
        mask = np.zeros((side, side), dtype=bool)
        top, left = generator.integers(0, side // 2, 2)
        mask[top : top + side // 3, left : left + side // 3] = True
        masks[f"row-{number:04d}"] = mask
    return rows_of([row(row_id, png((side, side))) for row_id in masks]), masks


def test_a_killed_run_loses_the_batch_in_flight_and_goes_on(tmp_path):
    rows, masks = _many(40)
    run(rows, tmp_path / "whole", exact(masks))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        backend = exact(masks)()

        class Telling(Exact):
            def __call__(self, images, texts, ids):
                os.write(writer, f"{len(ids)} ".encode())
                return super().__call__(images, texts, ids)

        run(rows, tmp_path / "out", lambda: Telling(backend.places, backend.rows))
        os._exit(1)
    os.close(writer)
    told = ""
    while told.count(" ") < 4:
        told += os.read(reader, 100).decode()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 100).decode():
        told += more
    begun = sum(map(int, told.split()))
    done = len(Journals(tmp_path / "out" / "journal", SCHEMA).indices)
    assert begun - 4 <= done <= begun and done < 40
    assert not (tmp_path / "out" / "summary.json").exists()
    with pytest.raises(ValueError, match="no complete run"):
        read_masks(tmp_path / "out")

    attempted = []

    class Counting(Exact):
        def __call__(self, images, texts, ids):
            attempted.extend(ids)
            return super().__call__(images, texts, ids)

    places = {row_id: [index] for index, row_id in enumerate(masks)}
    stored = [{"mask": to_png(mask)} for mask in masks.values()]
    run(rows, tmp_path / "out", lambda: Counting(places, stored))
    assert len(attempted) == 40 - done
    assert read_masks(tmp_path / "out").to_list() == read_masks(tmp_path / "whole").to_list()


def _records(count, start=0):
    empty = dict.fromkeys(SCHEMA.names)
    return [{**empty, "index": start + number, "id": f"r{start + number}"} for number in range(count)]


def test_a_torn_journal_is_read_up_to_the_tear_and_goes_on(tmp_path):
    path = tmp_path / "00000.arrows"
    journal = BatchJournal(path, SCHEMA)
    ends = [path.stat().st_size]
    for start in range(0, 12, 3):
        journal.append(_records(3, start))
        ends.append(path.stat().st_size)
    journal.close()
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), *ends]:
        for tail in (b"", b"\0" * 40):
            torn_file = whole[:length] + tail
            path.write_bytes(torn_file)
            # Zeros in place of zeros are no tear: messages are padded with them.
            complete = max(0, sum(torn_file[:end] == whole[:end] for end in ends) - 1)
            assert sum(batch.num_rows for batch in read(path, SCHEMA)[0]) == 3 * complete
            torn = BatchJournal(path, SCHEMA)
            torn.append(_records(2, 100))
            torn.close()
            ids = pa.Table.from_batches(read(path, SCHEMA)[0]).column("id").to_pylist()
            assert ids == [f"r{number}" for number in range(3 * complete)] + ["r100", "r101"]


def test_two_runs_at_once_are_refused(tmp_path):
    journal = BatchJournal(tmp_path / "00000.arrows", SCHEMA)
    with pytest.raises(ValueError, match="another run is writing"):
        BatchJournal(tmp_path / "00000.arrows", SCHEMA)
    journal.close()
    BatchJournal(tmp_path / "00000.arrows", SCHEMA).close()


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(30)), cuts=st.lists(st.integers(0, 30), max_size=4), size=st.integers(1, 7))
def test_journals_of_any_number_of_processes_come_out_in_order(tmp_path_factory, order, cuts, size):
    folder = tmp_path_factory.mktemp("journals")
    for number, part in enumerate(np.split(np.array(order), sorted(cuts))):
        journal = BatchJournal(folder / f"{number:05d}.arrows", SCHEMA)
        for start in range(0, len(part), 4):
            journal.append([{**dict.fromkeys(SCHEMA.names), "index": int(i)} for i in part[start : start + 4]])
        journal.close()
    journals = Journals(folder, SCHEMA)
    assert [index for table in journals.tables(size) for index in table.column("index").to_pylist()] == list(range(30))


def test_quota_and_share_are_nested_and_do_not_depend_on_order(tmp_path):
    rows, masks = _many(40)
    kept = {}
    for name, data, keep in [("some", rows, 10), ("more", rows, 20), ("turned", rows.select(range(39, -1, -1)), 10)]:
        summary = run(data, tmp_path / name, exact(masks), filters=Filters(keep=keep))
        kept[name] = set(read_masks(tmp_path / name)["id"])
        assert summary["kept"] == keep and summary["status"] == {"kept": keep, "not_needed": 40 - keep}
    assert kept["some"] < kept["more"] and kept["some"] == kept["turned"]
    attempted = run(rows, tmp_path / "attempt", exact(masks), attempt=10)
    assert attempted["attempted"] == 10
    assert set(read_masks(tmp_path / "attempt")["id"]) == kept["some"]


@pytest.mark.parametrize(("filters", "split"), [(Filters(), "kept"), (Filters(min_area=0.9), "rejected")])
def test_a_split_without_rows_is_no_obstacle(tmp_path, filters, split):
    rows, masks = _many(4)
    run(rows, tmp_path / "out", exact(masks), filters=filters)
    found = load_dataset(str(tmp_path / "out"))
    assert {name: data.num_rows for name, data in found.items()} == {split: 4}
    assert [len(read_masks(tmp_path / "out", name)) for name in ("kept", "rejected")].count(0) == 1


OTHERS = {
    "caption": lambda old: row(old["id"], old["images"][0], "a red mango"),
    "picture": lambda old: {**old, "images": [png((12, 12), "L")]},
}


@pytest.mark.parametrize("what", [*OTHERS, "settings"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_content_under_the_same_ids_is_another_run(tmp_path, what, finished):
    rows, masks = _many(3)
    settings = {"settings": {"max_new_tokens": 3}}
    run(rows, tmp_path, exact(masks), **settings)
    if not finished:
        (tmp_path / "summary.json").unlink()
        next((tmp_path / "journal").iterdir()).unlink()
    other = rows_of([OTHERS[what](old) for old in undecoded(rows)]) if what in OTHERS else rows
    asked = settings if what in OTHERS else {"settings": {"max_new_tokens": 4}}
    with pytest.raises(
        ValueError, match="content: " if what in OTHERS else "settings.max_new_tokens: 3 there, 4 asked"
    ):
        run(other, tmp_path, exact(masks), **asked)
    assert run(rows, tmp_path, exact(masks), **settings)["attempted"] == 3


def test_other_filters_write_anew_without_the_backend_and_another_run_is_refused(tmp_path):
    rows, masks = _many(10)
    run(rows, tmp_path, exact(masks))

    def never():
        raise AssertionError("nothing is left to do")

    summary = run(rows, tmp_path, never, filters=Filters(min_area=0.5))
    assert summary["status"] == {"too_small": 10}
    with pytest.raises(ValueError, match="query_source: 'caption' there, 'question' asked"):
        run(rows, tmp_path, never, query_source="question")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    with pytest.raises(ValueError, match="in use"):
        run(rows, tmp_path / "elsewhere", never)
    with pytest.raises(ValueError, match="more than once"):
        run(rows_of([row("a", None), row("a", None)]), tmp_path / "twice", never)


@given(area=st.floats(0, 1) | st.none(), score=st.floats(0, 1) | st.none(), cells=st.integers(0, 9) | st.none())
def test_a_status_is_the_first_reason(area, score, cells):
    status = Filters(min_area=0.1, max_area=0.9, min_score=0.5, min_cells=2).status("grounded", area, score, cells)
    reasons = {
        "grounded": area is None,
        "too_small": area is not None and area < 0.1,
        "nearly_all": area is not None and area > 0.9,
        "low_score": score is not None and score < 0.5,
        "empty_on_grid": cells is not None and cells < 2,
    }
    assert status == next((name for name, against in reasons.items() if against), "kept")
    assert Filters().status("no_region", None, None, None) == "no_region"


def test_the_folder_is_a_data_set_with_a_card_and_a_summary(tmp_path):
    rows, masks = _many(6)
    masks["row-0003"] = None
    run(rows, tmp_path / "out", exact(masks), filters=Filters(keep=9), query_source="question+answer")
    found = load_dataset(str(tmp_path / "out"))
    assert found["kept"].num_rows == 5 and found["rejected"]["status"] == ["no_region"]
    first = found["kept"][0]
    assert (first["query"], first["text"]) == ("What is there?", "What is there? a red apple")
    assert first["mask"].mode == "1" and first["boxes"] == [mask_box(masks["row-0000"])]
    assert first["query_source"] == "question+answer" and first["backend"] == first["source"] == "exact"
    assert math.isclose(first["area"], masks["row-0000"].mean(), rel_tol=1e-6)
    summary = json.loads(Path(tmp_path / "out" / "summary.json").read_text())
    assert summary["kept"] == 5 and "9 were wanted" in (tmp_path / "out" / "README.md").read_text()


LONG = "A red apple, two trees and a tree; " + ", ".join(f"thing {n}" for n in range(9))


def test_by_phrase_labels_have_masks_of_their_own_and_a_place_in_the_row(tmp_path):
    named = {
        "a red apple and a car": ["A red  apple", "car", "a red apple"],
        LONG: ["tree", "trees", "a tree", *(f"thing {n}" for n in range(9))],
        "no such words": ["cat"],
        "small": ["small"],
    }
    boxes = [[3.0 * n, 0.0, 3.0 * n + (0.5 if n > 11 else 2.0), 9.0] for n in range(13)]

    class Grounder:
        def __call__(self, images, texts):
            return [
                Grounding(boxes[-1:] if text == "small" else boxes[: len(named[text])], labels=named[text])
                for text in texts
            ]

    rows = rows_of([*(row(text[:5], png((40, 9)), text) for text in named), row("none", None)])
    asked = {"by_phrase": True, "filters": Filters(min_area=0.01, min_cells=0)}
    summary = run(rows, tmp_path / "out", lambda: TwoSteps(Grounder(), cut_out, {}), **asked)
    assert summary["status"] == {"kept": 10, "no_picture": 1, "no_region": 1, "too_small": 1}
    assert (summary["attempted"], summary["kept"], summary["kept_rows"]) == (5, 10, 2)
    kept, rejected = (read_masks(tmp_path / "out", split) for split in ("kept", "rejected"))
    assert {rejected["id"][n]: rejected["detail"][n] for n in range(2)} == {
        "no su": "the text has no words of 1 boxes, such as 'cat'", "small": "",
    }  # fmt: skip
    assert kept["detail"][0] == "" and kept["detail"][2] == "the first 8 of 12 phrases are used"
    (apple, _), (trees, *_) = (found["guidance"] for found in map(open_row, join_masks(rows, kept).select([0, 1])))
    assert (apple["query"], apple["occurrence"], apple["message_index"]) == ("a red apple", 0, 1)
    assert (np.array(apple["mask"]) == draw_boxes([boxes[0], boxes[2]], (40, 9))).all()
    assert trees["query"] == "tree" and LONG[find_query(LONG, trees) :].startswith("tree;")
    assert load_masks([tmp_path / "out"]).column_names[-1] == "occurrence"

    def never():
        raise AssertionError("nothing is left to do")

    assert run(rows, tmp_path / "out", never, **{**asked, "filters": Filters(keep=1, min_cells=0)})["kept_rows"] == 1
    with pytest.raises(ValueError, match=r"the backend florence2\+sam tells no phrases; use florence2-phrases, "):
        run(rows, tmp_path / "other", never, backend_name="florence2+sam", by_phrase=True)
    with pytest.raises(ValueError, match="by_phrase: True there, None asked"):
        run(rows, tmp_path / "out", never)
    assert run(rows.select([]), tmp_path / "empty", None, by_phrase=True)["attempted"] == 0
    assert len(read_masks(tmp_path / "empty")) == 0 and "occurrence" in read_masks(tmp_path / "empty").column_names


def test_a_phrase_of_the_answer_has_its_place_there(tmp_path):
    rows = rows_of([row("a", png((40, 9)), "It is a car.", "<|image|>a car? or<|image|>\nWhat is left of the car?")])
    boxes = [[0.0, 0.0, 9.0, 9.0], [9.0, 0.0, 20.0, 9.0]]
    wholes = [Grounding(boxes, labels=["the car", "a car"])]
    backend = TwoSteps(lambda images, texts: wholes, cut_out, {})
    run(rows, tmp_path, lambda: backend, by_phrase=True, query_source="question+answer")
    found = read_masks(tmp_path).select_columns(["query", "message_index", "occurrence"]).to_list()
    assert found == [
        {"query": "the car", "message_index": 0, "occurrence": 0},
        {"query": "a car", "message_index": 1, "occurrence": 0},
    ]


def test_exact_masks_by_phrase_stay_as_they_are_and_are_united_without(tmp_path):
    rows = rows_of([row(f"r{number}", png((30, 20)), "a dog and a dog") for number in range(3)])
    masks = [draw_boxes([[x, 2, x + 5, 9]], (30, 20)) for x in (1, 11, 21)]
    stored = [
        {"id": "r1", "query": "dog", "message_index": 1, "source": "x", "score": 0.9, "occurrence": n,
         "mask": to_png(mask)} for n, mask in enumerate(masks[:2])
    ]  # fmt: skip
    whole = {**stored[0], "id": "r2", "query": "a dog and a dog", "occurrence": None}
    phrases = Dataset.from_list([*stored, whole], features=PHRASE_FEATURES)
    for number, data in enumerate((phrases, join_masks(rows, phrases))):
        out = tmp_path / str(number)
        assert run(rows, out, lambda data=data: Exact.of(data), by_phrase=True)["kept"] == 3
        again = read_masks(out).select_columns(["id", "query", "message_index", "occurrence", "mask"])
        assert again.to_list() == phrases.select_columns(again.column_names).to_list()
        run(rows, tmp_path / f"{number} whole", lambda data=data: Exact.of(data))
        united = read_masks(tmp_path / f"{number} whole")
        assert united["query"] == ["a dog and a dog"] * 2 and "occurrence" not in united.column_names
        assert (np.array(united["mask"][0]) == (masks[0] | masks[1])).all()


def test_boxes_left_out_are_told_of_each_row_and_counted(tmp_path):
    told = {"few": "", "many": "the first 32 of 40 boxes are used", "tiny": "the first 32 of 33 boxes are used"}

    class Grounder:
        def __call__(self, images, texts):
            return [Grounding([[0.0, 0.0, 1.0 if text == "tiny" else 10.0, 1.0]], detail=told[text]) for text in texts]

    rows = rows_of([*(row(text, png((20, 20)), text) for text in told), row("none", None)])
    summary = run(
        rows, tmp_path, lambda: TwoSteps(Grounder(), cut_out, {}), filters=Filters(min_area=0.01, min_cells=0)
    )
    assert summary["status"] == {"kept": 2, "no_picture": 1, "too_small": 1} and summary["boxes_left_out"] == 2
    assert dict(zip(*(read_masks(tmp_path)[name] for name in ("id", "detail")), strict=True)) == {
        name: told[name] for name in ("few", "many")
    }
    assert "Of 2 rows more was found than a mask takes" in (tmp_path / "README.md").read_text()
    assert run(rows.select([]), tmp_path / "empty", None)["boxes_left_out"] == 0
