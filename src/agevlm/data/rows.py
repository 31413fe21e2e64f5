"""The row every data set of the project has, and its validation.

A row is {id, images, messages, guidance}: `messages` hold plain strings in which the literal `<|image|>` marks each
picture's place; `guidance` (or null) says which text (`query`, inside message `message_index`) should look at which
part (`mask`) of the first picture. A list of up to 8 such phrases says it phrase by phrase; one is a list of one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets.table import InMemoryTable
from PIL import Image

from agevlm.images import open_image, stored_bytes
from agevlm.store import digest


IMAGE_PLACEHOLDER = "<|image|>"
ROLES = ("system", "user", "assistant")
MAX_PHRASES = 8  # of a row; so many masks cost as much as one

MESSAGES = List({"role": Value("string"), "content": Value("string")})
GUIDANCE = {
    "query": Value("string"),
    "message_index": Value("int32"),
    "mask": ImageFeature(),
    "source": Value("string"),
    "score": Value("float32"),
}
ROW_FEATURES = Features({"id": Value("string"), "images": List(ImageFeature()), "messages": MESSAGES})
MASK_FEATURES = Features({"id": Value("string"), **GUIDANCE})
# A phrase may say which occurrence of its words in the message it means: 0, or null, is the first.
PHRASE_FEATURES = Features({**MASK_FEATURES, "occurrence": Value("int32")})


def resolve_inside(root: str | Path, path: str | Path) -> Path:
    """`path` below `root` as an absolute path; ValueError where it leaves `root` (absolute, `..`, symbolic link)."""
    base = Path(root).resolve()
    full = (base / path).resolve()
    if not full.is_relative_to(base):
        raise ValueError(f"path {str(path)!r} leaves its folder {base}; use a path inside it")
    return full


def undecoded(rows: Dataset) -> Dataset:
    """The rows with pictures and masks as they are stored, {bytes, path}: `open_image` decodes and turns them."""
    features = Features(_undecoded(dict(rows.features)))
    if features == rows.features:
        return rows
    info = rows.info.copy()
    info.features = features
    fingerprint = digest(f"{rows._fingerprint} undecoded", size=8)
    # Not `cast`: it would write a copy of every row where pictures stand in lists; what is stored is the same
    return Dataset(rows.data, info, rows.split, rows._indices, fingerprint)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, ImageFeature):
        return ImageFeature(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    return {name: _undecoded(part) for name, part in feature.items()} if isinstance(feature, dict) else feature


def refuse_names(rows: Dataset) -> Dataset:
    """The rows of a Parquet file. A picture or mask with a name alone gets empty bytes, which `open_image` refuses.

    A name in a file from elsewhere could be any file of this machine, or an address. Rows that a script makes may name
    files: they do not pass here.
    """
    table = rows.data.table
    for index, name in enumerate(table.column_names):
        column = table.column(index)
        if any(map(_names_files, column.chunks)):
            chunks = [
                pa.array([refuse_name(value) for value in chunk.to_pylist()], chunk.type)
                if _names_files(chunk)
                else chunk
                for chunk in column.chunks
            ]
            table = table.set_column(index, table.schema.field(name), pa.chunked_array(chunks, column.type))
    if table is rows.data.table:
        return rows
    fingerprint = digest(f"{rows._fingerprint} names refused", size=8)
    return Dataset(InMemoryTable(table), rows.info, rows.split, rows._indices, fingerprint)


def refuse_name(value: Any) -> Any:
    """`refuse_names` for one value of a row: a picture, a list of them, or a mapping that holds some."""
    if isinstance(value, list):
        return [refuse_name(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"}:
        return {**value, "bytes": b""} if value["bytes"] is None and value["path"] is not None else value
    return {name: refuse_name(part) for name, part in value.items()}


def _names_files(values: pa.Array) -> bool:
    """Whether a picture among stored values has a name and no bytes."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _names_files(values.flatten())
    if not pa.types.is_struct(values.type):
        return False
    parts = dict(zip((field.name for field in values.type), values.flatten(), strict=True))
    if parts.keys() == {"bytes", "path"}:
        return bool(pc.any(pc.and_(parts["bytes"].is_null(), parts["path"].is_valid())).as_py())
    return any(map(_names_files, parts.values()))


def content_digest(rows: Dataset, columns: Sequence[str]) -> str:
    """A digest of all that columns of texts, pictures and masks hold; columns that are not there count as such.

    Files of pictures count by their bytes. Nothing is decoded.
    """
    there = [name for name in columns if name in rows.column_names]

    def pieces() -> Iterator[str | bytes]:
        yield json.dumps(there)
        for batch in rows.select_columns(there).with_format("arrow").iter(batch_size=64) if there else ():
            for name in there:
                for value in batch[name].to_pylist():
                    yield from _content(value)

    return digest(pieces())


def _content(value: Any) -> Iterator[str | bytes]:
    """Text and bytes of a value, each with its length, so that none can pass for two."""
    if isinstance(value, Mapping) and "bytes" in value:
        stored = stored_bytes(value)
        yield f"{len(stored)} bytes"
        yield stored
    elif isinstance(value, (Mapping, list)):
        yield json.dumps(list(value) if isinstance(value, Mapping) else len(value))
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _content(part)
    else:
        yield json.dumps(value, default=str)


def validate_row(row: Mapping[str, Any], where: str = "row") -> None:
    """Raises ValueError naming `where`, the row's id, the field, the value seen and the fix; returns None if valid."""
    open_row(row, where)


def open_row(
    row: Mapping[str, Any], where: str = "row", picture: Callable[[Any, str], Image.Image] = open_image
) -> dict[str, Any]:
    """The row with its pictures (by `picture`) and its masks decoded, once; its `guidance` is a list of phrases.
    Raises as `validate_row` does."""
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise ValueError(f"{where}: field id is {row.get('id')!r}; give every row a non-empty string id")
    name = f"{where} (id {row['id']!r})"
    images = row.get("images")
    messages: Any = row.get("messages")
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"{name}: field images is {type(images).__name__}; use a list, empty for text-only rows")
    _validate_messages(name, messages)
    placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if placeholders != len(images):
        raise ValueError(
            f"{name}: {placeholders} {IMAGE_PLACEHOLDER} in messages but {len(images)} pictures in images; "
            f"write one {IMAGE_PLACEHOLDER} where each picture belongs"
        )
    opened = [picture(image, f"{name}, images[{index}]") for index, image in enumerate(images)]
    phrases = []
    for number, phrase in enumerate(phrases_of(row)):
        field = f"guidance[{number}]" if isinstance(row["guidance"], (list, tuple)) else "guidance"
        if not isinstance(phrase, Mapping) or number >= MAX_PHRASES:
            raise ValueError(
                f"{name}: field {field} is {type(phrase).__name__}; use a mapping, a list of at most {MAX_PHRASES} "
                "mappings, or null"
            )
        phrases.append({**phrase, "mask": _open_mask(name, field, phrase, messages, opened)})
    return {**row, "images": opened, "guidance": phrases}


def phrases_of(row: Mapping[str, Any]) -> Sequence[Any]:
    """The phrases of a row's `guidance`: none for null, and one where it is no list."""
    guidance = row.get("guidance")
    return guidance if isinstance(guidance, (list, tuple)) else [] if guidance is None else [guidance]


def which_guided(guidance: pa.Array) -> np.ndarray:
    """Which values of a stored column `guidance` hold a phrase: bool (rows,)."""
    if pa.types.is_list(guidance.type):
        return pc.greater(pc.list_value_length(guidance).fill_null(0), 0).to_numpy(zero_copy_only=False)
    return guidance.is_valid().to_numpy(zero_copy_only=False)


def find_query(content: str, phrase: Mapping[str, Any]) -> int:
    """Where the words of a phrase start in its message, -1 where they do not occur (so often). Words inside of a
    placeholder do not count."""
    query, start = phrase["query"], -1
    content = _readable(content, query)
    for _ in range((phrase.get("occurrence") or 0) + 1):
        start = content.find(query, start + 1)
        if start < 0:
            break
    return start


def occurrence_at(content: str, query: str, start: int) -> int:
    """Which occurrence of the words in a message starts at `start`, as `find_query` takes it: 0 for the first."""
    content = _readable(content, query)
    return sum(content.startswith(query, place) for place in range(start))


def _readable(content: str, query: str) -> str:
    """A message in which the placeholders hold no words, unless the query holds one."""
    return content if IMAGE_PLACEHOLDER in query else content.replace(IMAGE_PLACEHOLDER, "\0" * len(IMAGE_PLACEHOLDER))


def _validate_messages(name: str, messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{name}: field messages is {messages!r}; use a non-empty list of {{role, content}}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, Mapping) else message
            raise ValueError(f"{name}: messages[{index}].role is {role!r}; use one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise ValueError(f"{name}: messages[{index}].content is {kind}; use one string with {IMAGE_PLACEHOLDER}")
        if message["role"] != "user" and IMAGE_PLACEHOLDER in message["content"]:
            raise ValueError(f"{name}: messages[{index}] ({message['role']}) holds {IMAGE_PLACEHOLDER}; "
                             "only user messages can show a picture")  # fmt: skip


def _open_mask(
    name: str, field: str, guidance: Mapping[str, Any], messages: Any, images: list[Image.Image]
) -> Image.Image:
    """The mask of a phrase, the `field` of a row. Raises ValueError where it does not fit the row."""
    missing = [wanted for wanted in GUIDANCE if wanted not in guidance]
    if missing:
        raise ValueError(f"{name}: {field} lacks {', '.join(missing)}; add them")
    if not images:
        raise ValueError(f"{name}: guidance on a row without pictures; set guidance to null")
    index, query = guidance["message_index"], guidance["query"]
    if not isinstance(index, int) or not 0 <= index < len(messages):
        raise ValueError(f"{name}: {field}.message_index is {index!r}; use 0 to {len(messages) - 1}")
    content, occurrence = messages[index]["content"], guidance.get("occurrence") or 0
    if not isinstance(occurrence, int) or occurrence < 0:
        raise ValueError(f"{name}: {field}.occurrence is {occurrence!r}; use null, or 0 for the first")
    if not isinstance(query, str) or not query or find_query(content, guidance) < 0:
        often = f" {occurrence + 1} times" if occurrence else ""
        raise ValueError(f"{name}: {field}.query {query!r} is not in messages[{index}] {content!r}{often}; copy it")
    mask = open_image(guidance["mask"], f"{name}, {field}.mask", mode="1")
    if mask.size != images[0].size:
        raise ValueError(f"{name}: {field}.mask is {mask.width} x {mask.height} but images[0] is "
                         f"{images[0].width} x {images[0].height}; store the mask at the picture's size")  # fmt: skip
    if mask.getbbox() is None:
        raise ValueError(f"{name}: {field}.mask is empty; set guidance to null where nothing should be looked at")
    return mask
