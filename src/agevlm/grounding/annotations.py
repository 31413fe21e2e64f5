"""Masks of other tools: COCO and LabelMe files, pictures of masks, boxes in a CSV file.

A mask is drawn once the size of its picture is known. What is wrong with one mask is raised then, so that the others
are read; a file of another form is refused at once.
"""

import base64
import binascii
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from agevlm.data.masks import OCCURRENCE
from agevlm.data.tables import read_csv
from agevlm.images import read_classes
from agevlm.store import read_json

from .masks import draw_polygons, from_segmentation


PICTURES = (".png", ".bmp", ".tif", ".tiff")  # formats of masks that lose nothing
_WORDS = {"query": str, "message_index": int, OCCURRENCE: int}  # fields of ours in COCO's annotations
_COLUMNS = ("image", "label", "xmin", "ymin", "xmax", "ymax")
_NO_LABEL = {"mask", "masks", "seg", "segmentation", "instance", "object", "label"}  # words in names of files


@dataclass(frozen=True)
class Annotation:
    """One mask.

    Attributes:
        where: file and place, for messages.
        names: names that its picture or row may have, in turn, each with the label that then remains.
        draw: size (width, height) of the picture -> bool (height, width); ValueError where it cannot be drawn.
        source: kind of file.
        words: `query`, `message_index` and `occurrence`, where the file has them (`agevlm ground export`).
        file: a picture of a mask.
    """

    where: str
    names: Sequence[tuple[str, str | None]]
    draw: Callable[[tuple[int, int]], np.ndarray]
    source: str
    words: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None
    file: Path | None = None


def read_annotations(places: Sequence[str | Path]) -> list[Annotation]:
    """The masks in files, and in folders of them.

    Raises:
        ValueError: nothing is there, or a file that was named is of another form.
    """
    found: list[Annotation] = []
    for place in map(Path, places):
        before = len(found)
        for path, name in files_of(place):
            try:
                found += _read_file(path, name)
            except ValueError as error:
                if path == place:
                    raise
                found.append(Annotation(str(path), [], partial(_refuse, error), "unknown"))
        if len(found) == before:
            raise ValueError(f"{place} holds no masks; give a file that does, or a folder of {', '.join(_READERS)}")
    return found


def files_of(place: Path) -> list[tuple[Path, str]]:
    """The files of masks below a folder, or the one file, each with its name there."""
    if not place.is_dir():
        return [(place, place.name)]
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in _READERS and path.is_file())
    return [(path, path.relative_to(place).as_posix()) for path in files]


def _read_file(path: Path, name: str) -> list[Annotation]:
    """The masks of a file that is called `name` below its folder."""
    read = _READERS.get(path.suffix.lower())
    if read is None or not path.is_file():
        raise ValueError(f"{path} is no file of masks; give a folder, or one of {', '.join(_READERS)}")
    return list(read(path, name))


def _refuse(error: ValueError, size: tuple[int, int]) -> np.ndarray:
    raise error


# ---- JSON ----


def _read_json(path: Path, name: str) -> Iterator[Annotation]:
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return _read_labelme(path, name, content)
    return _read_coco(path, content)


def _read_coco(path: Path, content: Any) -> Iterator[Annotation]:
    images, annotations = (_objects(content, name, path) for name in ("images", "annotations"))
    listed = _objects(content, "categories", path) if content.get("categories") else []
    by_id, categories = ({_value(item, "id", (int, str), path): item for item in items} for items in (images, listed))
    if len(by_id) < len(images):
        raise ValueError(f"{path}: images repeat an id; make it unique")
    for place, item in enumerate(annotations):
        where = f"{path}, annotation {item.get('id', place)!r}"
        try:
            image = by_id.get(_value(item, "image_id", (int, str), path))
            if image is None:
                raise ValueError(f"image_id {item['image_id']!r} is the id of no image")
            words = {name: _value(item, name, kind, path, True) for name, kind in _WORDS.items()}
            words = words if None not in (words["query"], words["message_index"]) else {}
            category = categories.get(_value(item, "category_id", (int, str), path, True))
            label = None if category is None or words else _value(category, "name", str, path).strip()
            names = [(_value(image, "file_name", str, path), label)]
            score = _value(item, "score", (int, float), path, True)
            size = tuple(_value(image, side, int, path, True) for side in ("width", "height"))
            yield Annotation(where, names, partial(_draw_coco, item, size), "coco", words, score)
        except ValueError as error:
            yield Annotation(where, [], partial(_refuse, error), "coco")


def _draw_coco(item: Mapping[str, Any], size: tuple[Any, ...], picture: tuple[int, int]) -> np.ndarray:
    _check_size(size, picture)
    if not item.get("segmentation") and (box := item.get("bbox")):
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"a bbox is [left, top, width, height], got {box!r:.80}")
        left, top, width, height = map(_number, box)
        if width < 0 or height < 0:
            raise ValueError(f"the bbox {box} has a negative width or height")
        return _draw_box((left, top, left + width, top + height), picture)
    return from_segmentation(item.get("segmentation"), picture)


def _read_labelme(path: Path, name: str, content: Mapping[str, Any]) -> Iterator[Annotation]:
    shown = content.get("imagePath")
    last = PurePosixPath(shown.replace("\\", "/")).name if isinstance(shown, str) and shown else path.stem
    size = (content.get("imageWidth"), content.get("imageHeight"))
    for place, shape in enumerate(content["shapes"]):
        label = shape.get("label") if isinstance(shape, dict) else None
        label = label.strip() if isinstance(label, str) and label.strip() else None
        names = [(str(PurePosixPath(name).with_name(last)), label), (last, label)]
        yield Annotation(f"{path}, shape {place + 1}", names, partial(_draw_shape, shape, size), "labelme")


def _draw_shape(shape: Any, size: tuple[Any, ...], picture: tuple[int, int]) -> np.ndarray:
    _check_size(size, picture)
    points = shape.get("points") if isinstance(shape, dict) else None
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise ValueError(f"points are a list of [x, y], got {points!r:.80}")
    flat = [_number(value) for point in points for value in point]
    kind = shape.get("shape_type") or "polygon"
    if kind == "polygon":
        return draw_polygons([flat], picture)
    if kind == "rectangle" and len(points) == 2:
        return _draw_box(flat, picture)
    if kind == "circle" and len(points) == 2:
        rows, columns = np.ogrid[: picture[1], : picture[0]]
        radius = math.dist(flat[:2], flat[2:])
        return np.hypot(columns + 0.5 - flat[0], rows + 0.5 - flat[1]) <= radius
    if kind == "mask" and points:
        try:
            stored = base64.b64decode(shape.get("mask") or "", validate=True)
        except (TypeError, binascii.Error) as error:
            raise ValueError(f"its mask is no base64: {error}") from error
        part = np.array(read_classes(stored, "its mask"))
        left, top = round(flat[0]), round(flat[1])
        whole = np.zeros(picture[::-1], dtype=bool)
        if left < 0 or top < 0 or whole[top : top + part.shape[0], left : left + part.shape[1]].shape != part.shape:
            raise ValueError(f"its mask of {part.shape[1]} x {part.shape[0]} at {left}, {top} leaves the picture")
        whole[top : top + part.shape[0], left : left + part.shape[1]] = part
        return whole
    raise ValueError(f"a {kind!r} of {len(points)} points has no area; draw a polygon, a rectangle or a circle")


# ---- Boxes ----


def _read_boxes(path: Path, name: str) -> Iterator[Annotation]:
    lines = read_csv(path)
    if lines and (missing := [column for column in _COLUMNS if column not in lines[0] and column != "label"]):
        raise ValueError(f"{path} lacks the column {', '.join(missing)}; boxes have {', '.join(_COLUMNS)}")
    for place, line in enumerate(lines, start=2):
        names = [(line["image"] or "", line.get("label") or None)]
        yield Annotation(f"{path}, line {place}", names, partial(_draw_line, line), "boxes")


def _draw_line(line: Mapping[Any, Any], picture: tuple[int, int]) -> np.ndarray:
    if None in line:  # as `read_csv` has it
        raise ValueError(f"the line has more fields than the header, {line[None]!r:.80}; quote texts")
    left, top, right, bottom = ends = [_number(line[column]) for column in _COLUMNS[2:]]
    if left > right or top > bottom:
        raise ValueError(f"the box {ends} ends before it begins; xmax and ymax are its right and bottom ends")
    if any(ends) and all(0 <= end <= 1 for end in ends):
        raise ValueError(f"the box {ends} is in shares of the picture; multiply by its width and height")
    return _draw_box(ends, picture)


def _draw_box(ends: Sequence[Any], picture: tuple[int, int]) -> np.ndarray:
    """A box [left, top, right, bottom] in pixels, right and bottom excluded."""
    left, top, right, bottom = map(_number, ends)
    return draw_polygons([[left, top, right, top, right, bottom, left, bottom]], picture)


# ---- Pictures of masks ----


def _read_picture(path: Path, name: str) -> Iterator[Annotation]:
    """NAME.png for a whole picture; NAME_1.png, NAME_dog_1.png, NAME/1.png or NAME/dog.png for one object of it."""
    stem = PurePosixPath(name).with_suffix("")
    names: list[tuple[str, str | None]] = []
    if stem.parent.name:
        names.append((str(stem.parent), _label(stem.name.split("_"))))
    words = stem.name.split("_")
    for place in (stem, PurePosixPath(stem.name)):
        for end in range(len(words), 0, -1):
            names.append((str(place.with_name("_".join(words[:end]) or "_")), _label(words[end:])))
    yield Annotation(str(path), list(dict.fromkeys(names)), partial(_draw_picture, path), "png", file=path)


def _label(words: Sequence[str]) -> str | None:
    return " ".join(word for word in words if not word.isdigit() and word.lower() not in _NO_LABEL).strip() or None


def _draw_picture(path: Path, picture: tuple[int, int]) -> np.ndarray:
    mask = read_classes(path, "the mask")
    _check_size(mask.size, picture)
    return np.array(mask)


# ---- Fields ----


def _check_size(size: tuple[Any, ...], picture: tuple[int, int]) -> None:
    if None not in size and tuple(size) != picture:
        raise ValueError(
            f"a mask of {size[0]} x {size[1]} on a picture of {picture[0]} x {picture[1]}; make it of the picture as "
            "it is shown, upright"
        )


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.80} is no number of pixels")
    return number


def _objects(content: Any, name: str, path: Path) -> list[dict[str, Any]]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{path} is neither a COCO file, with the lists `images` and `annotations`, nor of LabelMe")
    for item in found:
        if not isinstance(item, dict):
            raise ValueError(f"{path}: {name} hold {item!r:.80}, expected objects")
    return found


def _value(item: dict[str, Any], name: str, kind: Any, path: Path, optional: bool = False) -> Any:
    value = item.get(name)
    if isinstance(value, bool) or not (isinstance(value, kind) or (optional and value is None)):
        raise ValueError(f"{path}: the field {name} of {item!r:.200} is {value!r:.40}; correct it")
    return value


_READERS = {".json": _read_json, ".csv": _read_boxes, **dict.fromkeys(PICTURES, _read_picture)}
