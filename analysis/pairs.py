"""Pictures with a text each, out of scenes, training rows or benchmark rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from PIL import Image

from agevlm.data.rows import IMAGE_PLACEHOLDER, open_image


CAPTIONS = "captions/train.parquet"  # of a folder of scenes
COLUMNS = ("caption", "text", "question")


@dataclass(frozen=True)
class Pair:
    """A picture and what is said or asked about it; `mask` (of its size) marks what that is about, if known."""

    id: str
    image: Image.Image
    text: str
    mask: Image.Image | None = None


def load_pairs(
    data: str | Path, limit: int, column: str | None = None, *, distinct: bool = False, strict: bool = False
) -> tuple[list[Pair], int]:
    """The first `limit` usable pairs, and how many rows were left out on the way.

    Args:
        data: a folder of scenes, whose captions are read, or one `.parquet`, `.json` or `.jsonl` file with `image` or
            `images`, and a text.
        column: of the text. Default: the first answer in `messages`, else `caption`, `text` or `question` (its first
            line: options and instructions stand on lines of their own).
        distinct: of rows with equal texts, take the first; a mismatched pair of equal texts would match.
        strict: stop at a bad row.

    Raises:
        ValueError: no such data, no text or picture in it, fewer than two pairs.
    """
    rows = _open(Path(data))
    pairs: list[Pair] = []
    texts: set[str] = set()
    left_out = 0
    for index, row in enumerate(_undecoded(rows)):
        if len(pairs) == limit:
            break
        name = str(row.get("id", index))
        try:
            pair = _pair(row, name, column)
        except ValueError:
            if strict:
                raise
            left_out += 1
            continue
        if distinct and pair.text in texts:
            left_out += 1
        else:
            pairs.append(pair)
            texts.add(pair.text)
    if len(pairs) < 2:
        raise ValueError(f"{data}: {len(pairs)} usable pair(s) of picture and text, {left_out} row(s) left out")
    return pairs, left_out


def _open(path: Path) -> Dataset:
    if path.is_dir():
        path = path / CAPTIONS
    readers = {".parquet": Dataset.from_parquet, ".json": Dataset.from_json, ".jsonl": Dataset.from_json}
    if path.suffix not in readers:
        raise ValueError(f"{path} is neither a folder of scenes nor a file of type {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"there is no {path}; give a folder of scenes (`agevlm data scenes`) or a file of rows")
    return readers[path.suffix](str(path))


def _undecoded(rows: Dataset) -> Iterator[dict[str, Any]]:
    """Rows whose pictures are bytes: they are decoded under our own limits, one at a time."""
    for name, feature in rows.features.items():
        if isinstance(feature, ImageFeature):
            rows = rows.cast_column(name, ImageFeature(decode=False))
        elif isinstance(feature, ListFeature) and isinstance(feature.feature, ImageFeature):
            rows = rows.cast_column(name, ListFeature(ImageFeature(decode=False)))
    yield from rows


def _pair(row: Mapping[str, Any], name: str, column: str | None) -> Pair:
    images = row.get("images")
    picture = row.get("image") if images is None else (images[0] if len(images) == 1 else None)
    if picture is None:
        raise ValueError(f"row {name}: needs exactly one picture in `image` or `images`")
    text = _text(row, name, column).replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise ValueError(f"row {name}: its text is empty")
    image = open_image(picture, f"row {name}, field image")
    mask = None if row.get("mask") is None else open_image(row["mask"], f"row {name}, field mask", mode="1")
    if mask is not None and mask.size != image.size:
        raise ValueError(f"row {name}, field mask: {mask.size} but the picture is {image.size}")
    return Pair(name, image, text, mask)


def _text(row: Mapping[str, Any], name: str, column: str | None) -> str:
    if column is None and row.get("messages"):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        if answers:
            return answers[0]
    known = [key for key in ([column] if column else COLUMNS) if isinstance(row.get(key), str)]
    if not known:
        raise ValueError(f"row {name}: no text in {column or ', '.join(('messages', *COLUMNS))}; it has {list(row)}")
    return row[known[0]].strip().split("\n", 1)[0]
