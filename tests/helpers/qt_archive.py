"""Writes small archives of Qt resources, format 1 to 3."""

import struct
import zlib
from collections.abc import Mapping

import pyarrow


def packed(content: bytes, way: str) -> bytes:
    """The data of a file: `plain`, `zlib` or `zstd`."""
    if way == "zlib":
        content = struct.pack(">I", len(content)) + zlib.compress(content)
    elif way == "zstd":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    return struct.pack(">I", len(content)) + content


def qt_archive(files: Mapping[str, bytes], form: int = 3, way: str = "plain") -> bytes:
    """An archive of `files` by path: header, data, names, tree; children stand behind their folder, level by level."""
    tree: dict = {}
    for path, content in files.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = content
    nodes, data, names = [("", tree)], b"", b""
    rows = []
    for name, found in nodes:  # grows
        row = [len(names), {"plain": 0, "zlib": 1, "zstd": 4}[way], 1, len(data)]
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(found, dict):
            row[1:] = [2, len(found), len(nodes)]
            nodes += found.items()
        else:
            data += packed(found, way)
        rows.append(struct.pack(">IHII", *row) + bytes(8 if form > 1 else 0))
    start = 20 if form < 3 else 24
    header = struct.pack(">4s4I", b"qres", form, start + len(data + names), start, start + len(data))
    return header + bytes(start - 20) + data + names + b"".join(rows)
