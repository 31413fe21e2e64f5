"""Pictures with a text each, out of scenes, training rows or benchmark rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from agevlm.data.rows import IMAGE_PLACEHOLDER, resolve_inside, undecoded
from agevlm.data.tables import read_files
from agevlm.images import open_image
from agevlm.progress import Bar


CAPTIONS = "captions/train.parquet"  # of a folder of scenes
COLUMNS = ("caption", "text", "question")


@dataclass(frozen=True)
class Pair:
    """A picture and a text about it. Pictures are decoded each time they are asked for: a thousand
    decoded photographs would fill the memory.

    Attributes:
        picture: anything that `open_image` takes.
        outline: the same of a mask that marks what the text is about, None if that is not known.
    """

    id: str
    picture: Any
    text: str
    outline: Any = None

    @property
    def image(self) -> Image.Image:
        return open_image(self.picture, f"row {self.id}, field image")

    @property
    def mask(self) -> Image.Image | None:
        """Of the picture's size."""
        return None if self.outline is None else open_image(self.outline, f"row {self.id}, field mask", mode="1")


@dataclass(frozen=True)
class LeftOut:
    """Rows that are no pairs: id and reason of bad ones, and how many only repeat the text of an earlier one."""

    bad: list[dict[str, str]] = field(default_factory=list)
    repeated: int = 0

    def __str__(self) -> str:
        return f"{len(self.bad)} bad row(s) left out" + (
            f", {self.repeated} with a text that was there" if self.repeated else ""
        )


def load_pairs(
    data: str | Path,
    limit: int,
    column: str | None = None,
    *,
    distinct: bool = False,
    strict: bool = False,
    progress: bool = False,
) -> tuple[list[Pair], LeftOut]:
    """The first `limit` usable pairs, and the rows that were left out before them.

    Args:
        data: a folder of scenes, whose captions are read, or one `.parquet`, `.json` or `.jsonl` file with `image` or
            `images`, and a text. Pictures may be paths inside of the file's folder.
        column: of the text. Default: the first answer in `messages`, else `caption`, `text` or `question` (its first
            line: options and instructions stand on lines of their own).
        distinct: of rows with equal texts, take the first; a mismatched pair of equal texts would match.
        strict: stop at a bad row.

    Raises:
        ValueError: no such data, no text or picture in it, fewer than two pairs.
    """
    path = Path(data) / CAPTIONS if Path(data).is_dir() else Path(data)
    found: dict[Any, Pair] = {}
    bad: list[dict[str, str]] = []
    repeated = 0
    with Bar(desc="reading", total=limit, unit="pair", disable=not progress) as bar:
        for index, row in enumerate(undecoded(_open(path))):
            if len(found) == limit:
                break
            name = str(row.get("id", index))
            try:
                pair = _pair(row, name, column, path.parent)
            except ValueError as error:
                if strict:
                    raise
                bad.append({"id": name, "reason": str(error)})
                continue
            key = pair.text if distinct else index
            if key in found:
                repeated += 1
                continue
            found[key] = pair
            bar.update()
    left_out = LeftOut(bad, repeated)
    if len(found) < 2:
        first = f"; the first: {bad[0]['reason']}" if bad else ""
        raise ValueError(f"{data}: {len(found)} usable pair(s) of picture and text, {left_out}{first}")
    return list(found.values()), left_out


def _open(path: Path) -> Dataset:
    suffixes = (".parquet", ".json", ".jsonl")
    if path.suffix not in suffixes:
        raise ValueError(f"{path} is neither a folder of scenes nor a file of type {', '.join(suffixes)}")
    if not path.is_file():
        raise ValueError(f"there is no {path}; give a folder of scenes (`agevlm data scenes`) or a file of rows")
    return read_files([path])


def _pair(row: Mapping[str, Any], name: str, column: str | None, root: Path) -> Pair:
    images = row.get("images")
    picture = row.get("image") if images is None else (images[0] if len(images) == 1 else None)
    if picture is None:
        raise ValueError(f"row {name}: needs exactly one picture in `image` or `images`")
    text = _text(row, name, column).replace(IMAGE_PLACEHOLDER, "").strip()
    if not text:
        raise ValueError(f"row {name}: its text is empty")
    mask = row.get("mask")
    try:
        pair = Pair(name, _source(picture, root), text, None if mask is None else _source(mask, root))
    except ValueError as error:
        raise ValueError(f"row {name}, field image or mask: {error}") from error
    shape, outline = pair.image.size, pair.mask
    if outline is not None and outline.size != shape:
        raise ValueError(f"row {name}, field mask: {outline.size} but the picture is {shape}")
    return pair


def _source(picture: Any, root: Path) -> Any:
    """Bytes of a picture, or its path, which must lie inside of `root`."""
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    return resolve_inside(root, picture) if isinstance(picture, str) else picture


def _text(row: Mapping[str, Any], name: str, column: str | None) -> str:
    if column is None and row.get("messages"):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        if answers:
            return answers[0]
    known = [key for key in ([column] if column else COLUMNS) if isinstance(row.get(key), str)]
    if not known:
        raise ValueError(f"row {name}: no text in {column or ', '.join(('messages', *COLUMNS))}; it has {list(row)}")
    return row[known[0]].strip().split("\n", 1)[0]
