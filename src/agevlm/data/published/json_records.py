"""Reads JSONL files and JSON arrays of any size record by record, from any record on, in flat memory.

A file is cut into chunks of equally many records by their byte offsets, so that processes read their chunks on their
own. Records are handed out as bytes: one that is broken costs itself, not the file.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from agevlm.store import check_text

from .records import CONVERSATIONS, MAX_RECORD_BYTES


_BLOCK = 2**20
# A whole string (possessive: an open one must not be tried again letter by letter), what structures an array, or the
# start of a string that goes on behind the block.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]|"', re.DOTALL)
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """`count` records, the first of which is number `first` (from 0) and lies at byte `offset`."""

    index: int
    first: int
    count: int
    offset: int


def check_shape(path: Path) -> None:
    """Looks at a file's beginning. One damaged row says nothing of the others; another form of file does.

    Raises:
        ValueError: neither rows of JSON, one a line, nor (.json) an array of them.
    """
    check_text(path)
    with path.open("rb") as file:
        head = file.read(MAX_RECORD_BYTES + 1).removeprefix(_BOM).lstrip()
    found = None
    first, *others = [line for line in head.splitlines()[:20] if line.strip()] or [b""]
    if not head:
        found = "is empty"
    elif head.startswith(b"[") and path.suffix.lower() != ".json":
        if first.strip() == b"[" or (not others and isinstance(_parsed(first), list)):
            found = "is one JSON array; name it .json"
    elif head.startswith(b"{"):
        found = _object_shape(head, first, not others)
    elif not any(line.lstrip()[:1] in (b"{", b"[") for line in (first, *others)):
        found = f"begins with {head[:40]!r}; give one JSON object a line, or an array of them"
    if found is not None:
        raise ValueError(f"{path} {found}")


def _object_shape(head: bytes, first: bytes, alone: bool) -> str | None:
    """What is wrong with a file that begins with an object; None where it may be the first row."""
    if first.strip() != b"{" and not alone:
        return None
    text = head.decode("utf-8", errors="replace")
    try:
        content, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return "is one object; give the array of its rows" if first.strip() == b"{" else None
    if text[end:].strip():
        return "has objects of several lines each; write one object a line, or an array of them"
    has_rows = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in content.values())
    if alone and (CONVERSATIONS & content.keys() or not has_rows):
        return None
    return f"is one object with the fields {', '.join(content)}; give the array of its rows"[:300]


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_array(path: Path) -> bool:
    """Whether a file is one JSON array: it ends in .json and its first character is a bracket."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".json" and file.read(_BLOCK).removeprefix(_BOM).lstrip()[:1] == b"["


def plan_chunks(path: Path, size: int, limit: int | None = None) -> list[Chunk]:
    """The file in chunks of `size` records, of the first `limit` records.

    Raises:
        ValueError: an element of an array is too long; there is no telling where it ends.
    """
    chunks: list[Chunk] = []
    offset, count = 0, 0
    for number, (start, _) in enumerate(islice(read_records(path), limit)):
        if number % size == 0:
            if count:
                chunks.append(Chunk(len(chunks), number - size, size, offset))
            offset, count = start, 0
        count += 1
    if count:
        chunks.append(Chunk(len(chunks), len(chunks) * size, count, offset))
    return chunks


def read_records(path: Path, chunk: Chunk | None = None) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset, bytes) of all records, or of those of a chunk. Empty lines are none; `None` is a line too long."""
    array = is_array(path)
    with path.open("rb") as file:
        if chunk is not None:
            file.seek(chunk.offset)
        records = _elements(file, path, at_start=chunk is None) if array else _lines(file)
        yield from records if chunk is None else islice(records, chunk.count)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    offset = file.tell()
    while line := file.readline(MAX_RECORD_BYTES):
        start, offset = offset, offset + len(line)
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_RECORD_BYTES)
                offset += len(line)
            yield start, None
        elif line.removeprefix(_BOM).strip():
            yield start, line


def _elements(file: BinaryIO, path: Path, at_start: bool) -> Iterator[tuple[int, bytes | None]]:
    """Elements of the array whose opening bracket (`at_start`), or one of whose elements, comes next."""
    base, buffer = file.tell(), b""  # `base`: where the buffer, and with it the element, starts in the file
    at, depth = 0, 0 if at_start else 1
    while True:
        block = file.read(_BLOCK)
        buffer += block
        consumed = 0
        while found := _TOKEN.search(buffer, at):
            token = found.group()
            if token == b'"' and block:
                break  # an open string: read on
            at = found.end()
            if token in (b"[", b"{"):
                depth += 1
                if depth == 1:
                    consumed = at
            elif token == b"," and depth == 1:
                yield from _element(buffer, consumed, found.start(), base)
                consumed = at
            elif token in (b"]", b"}"):
                depth -= 1
                if depth == 0:
                    yield from _element(buffer, consumed, found.start(), base)
                    rest = buffer[at:].strip() or file.read(_BLOCK).strip()
                    if rest:
                        yield base + at, rest[:1000]  # no JSON: counted as a bad row
                    return
        else:
            at = len(buffer)
        base, buffer, at = base + consumed, buffer[consumed:], at - consumed
        if not block:
            yield from _element(buffer, 0, len(buffer), base)  # a file that was cut off
            return
        if len(buffer) > MAX_RECORD_BYTES:
            raise ValueError(
                f"{path}: the element of the array at byte {base} is longer than {MAX_RECORD_BYTES} bytes; "
                "shorten it, or check that the file is an array of rows"
            )


def _element(buffer: bytes, start: int, end: int, base: int) -> Iterator[tuple[int, bytes]]:
    element = buffer[start:end]
    if element.strip():
        yield base + start, element
