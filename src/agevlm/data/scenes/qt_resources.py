"""Reads archives of Qt's resource compiler (.rcc), format 1 to 3. Nothing in a file is trusted.

Numbers are big-endian. The header is `qres`, the format, and the places of tree, data and names (format 3: and flags).
A node of the tree has the place of its name, flags, and for a folder the number and index of its first child, for a
file its locale and the place of its data (from format 2 on: and a time). A name is a length, a hash and UTF-16. Data
is a length and bytes: as they are, as zlib behind the unpacked length, or as zstd.
"""

import struct
import zlib
from pathlib import Path

import pyarrow


MOST_BYTES = 1 << 28  # of an archive; and of its names, packed and unpacked files together
_LONGEST_PATH = 1000  # characters
_PLAIN, _ZLIB, _FOLDER, _ZSTD = 0, 1, 2, 4  # flags of a node
_CHUNK = 1 << 20


def read_resources(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, bytes]:
    """The files of an archive by their path in it.

    Raises:
        ValueError: a file that is no such archive, is damaged, or holds more than `most_bytes`.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"it has {path.stat().st_size} bytes, the limit is {most_bytes}")
        return _Archive(path.read_bytes(), most_bytes).files()
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a Qt resource archive ({error}); fetch it again") from error


class _Archive:
    def __init__(self, content: bytes, most_bytes: int):
        self.content, self.left = content, most_bytes
        magic, form, self.tree, self.data, self.names = self.numbers(">4s4I", 0, "header")
        if magic != b"qres" or form not in (1, 2, 3):
            raise ValueError(f"it begins with {magic!r} and format {form}, expected b'qres' and 1 to 3")
        self.node = ">IHII" if form == 1 else ">IHII8x"

    def take(self, place: int, length: int, what: str) -> bytes:
        if place + length > len(self.content):
            raise ValueError(f"the {what} at byte {place} ends outside of the {len(self.content)} bytes")
        return self.content[place : place + length]

    def numbers(self, form: str, place: int, what: str) -> tuple:
        return struct.unpack(form, self.take(place, struct.calcsize(form), what))

    def node_at(self, index: int) -> tuple[int, int, int, int]:
        """(place of the name, flags, and two numbers that depend on them)."""
        name, flags, first, second = self.numbers(self.node, self.tree + index * struct.calcsize(self.node), "node")
        return name, flags, first, second

    def spend(self, length: int) -> None:
        """Many small nodes may share one large name or file."""
        self.left -= length
        if self.left < 0:
            raise ValueError("its files have more bytes than the limit")

    def files(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        used, waiting = {0}, [(0, "")]
        while waiting:
            index, path = waiting.pop()
            _, flags, first, second = self.node_at(index)
            if flags == _FOLDER:
                for child in range(second, second + first):
                    if child in used:
                        raise ValueError(f"node {child} lies in two folders")
                    used.add(child)
                    waiting.append((child, self.child_path(path, child)))
            elif index == 0 or path in found:
                raise ValueError(f"it holds {path!r} twice" if path else "its first node is no folder")
            else:
                found[path] = self.unpacked(second, flags, path)
        return found

    def child_path(self, folder: str, index: int) -> str:
        place = self.names + self.node_at(index)[0]
        length, _ = self.numbers(">HI", place, "name")
        name = self.take(place + 6, 2 * length, "name").decode("utf-16-be")
        path = f"{folder}/{name}" if folder else name
        if name in ("", ".", "..") or set(name) & set("/\\\0") or len(path) > _LONGEST_PATH:
            raise ValueError(f"the name of node {index} is {name!r:.80}, which no file can have")
        self.spend(len(path))
        return path

    def unpacked(self, place: int, flags: int, path: str) -> bytes:
        (length,) = self.numbers(">I", self.data + place, "length")
        self.spend(length)
        packed = self.take(self.data + place + 4, length, "data")
        if flags == _PLAIN:
            return packed
        if flags == _ZLIB:
            unpacker = zlib.decompressobj()
            result = unpacker.decompress(packed[4:], self.left + 1)
            self.spend(len(result))
            if not unpacker.eof or unpacker.unused_data or len(result) != int.from_bytes(packed[:4], "big"):
                raise ValueError(f"{path!r} does not unpack to its length")
            return result
        if flags == _ZSTD:
            return self.from_zstd(packed)
        raise ValueError(f"{path!r} has the flags {flags}, expected 0, 1, 2 or 4")

    def from_zstd(self, packed: bytes) -> bytes:
        pieces: list[bytes] = []
        try:
            with pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd") as stream:
                while piece := stream.read(_CHUNK):
                    self.spend(len(piece))
                    pieces.append(piece)
        except OSError as error:
            raise ValueError(str(error)) from error
        return b"".join(pieces)
