"""One picture to look at: scenes with what is asked, the answer, and the outlines of the masks to look at."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from agevlm.data.masks import PHRASES
from agevlm.data.rows import MAX_PHRASES
from agevlm.data.tables import read_rows
from agevlm.drawing import outline, outline_phrases, panels
from agevlm.images import open_image, save_image


_SIDE, _TEXT_LINES, _COLUMNS, _PER_PART = 280, 12, 6, 6

Entry = tuple[Image.Image, Image.Image | None, str]


def _head(path: Path, count: int) -> list[dict]:
    """The first rows of a parquet file; empty where there is none."""
    return list(islice(read_rows(path), count)) if path.is_file() else []


def _training(folder: Path, part: str) -> Iterator[Entry]:
    rows = _head(folder / part / "train.parquet", _PER_PART)
    phrases = _head(folder / PHRASES / f"{part}.parquet", _PER_PART * MAX_PHRASES)
    for row in rows:
        yield training_entry(row, [phrase for phrase in phrases if phrase["id"] == row["id"]])


def training_entry(row: Mapping[str, Any], phrases: Sequence[Mapping[str, Any]]) -> Entry:
    """A training row with the masks of its phrases, all undecoded."""
    lines = []
    for index, message in enumerate(row["messages"]):
        mark = "> " if index in [phrase["message_index"] for phrase in phrases] else ""
        lines.append(f"{mark}{message['role'][0].upper()}: {message['content']}")
    image = open_image(row["images"][0], row["id"])
    drawn = [(phrase["query"], open_image(phrase["mask"], row["id"], mode="1")) for phrase in phrases]
    return outline_phrases(image, drawn), None, "\n".join(lines)


_TEXTS = {
    "pope": lambda row: f"POPE {row['category']}: {row['question']} -> {row['answer']}",
    "cvbench": lambda row: f"CV-Bench {row['task']}: {row['prompt']} -> {row['answer']}",
    "ocrbench": lambda row: f"OCRBench: {row['question']} -> {row['answer'][0]}",
    "hallusionbench": lambda row: (
        f"HallusionBench {row['subcategory']}, {row['sample_note']}: {row['question']} -> {row['gt_answer']}"
    ),
    "realworldqa": lambda row: f"RealWorldQA: {row['question']} -> {row['answer']}",
}


def _benchmark(path: Path) -> Iterator[Entry]:
    for row in _head(path, _PER_PART):
        mask = row["mask"] and open_image(row["mask"], row["id"], mode="1")
        yield open_image(row["image"], row["id"]), mask, f"{path.parent.name}: {_TEXTS[path.stem](row)}"


def draw_contact_sheet(folder: Path, out: Path) -> None:
    """Writes a PNG with the first rows of every file of a folder of scenes."""
    training = (_training(folder, part) for part in ("captions", "instructions"))
    tests = map(_benchmark, sorted((folder / "benchmarks").glob("*/*.parquet")))
    draw_entries(list(chain.from_iterable([*training, *tests])), out)


def draw_entries(entries: Sequence[Entry], out: Path) -> None:
    """Writes a PNG with a panel for each entry; nothing without entries."""
    if not entries:
        return
    drawn = [(text, image if mask is None else outline(image, mask)) for image, mask, text in entries]
    rows = [drawn[start : start + _COLUMNS] for start in range(0, len(drawn), _COLUMNS)]
    save_image(panels(rows, side=_SIDE, most_lines=_TEXT_LINES), out)
