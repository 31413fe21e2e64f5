"""Finds and reads the pictures of a published data set: in folders, and in tar archives that nobody has unpacked.

A path is looked up below the roots as it is written. Only where nothing is there, an index of all files below the
roots and in the archives is built (once, by one process, on disk: memory stays flat for millions of names) and asked:

 1. the path in an archive,
 2. the path below the folders that Cambrian's archives unpack to, which their readers are told to move,
 3. the path in other case or another Unicode form, if there is exactly one such file.

What was not found as written is said (`Found.note`). A path never leaves its root. Archives: `.tar`, parts of a split
one (`sam.tar_part*`) and, unpacked into the folder of the index first, `.tar.gz`. Loose archives in a root are found
by themselves, but for `.tar.gz`, which has to be named.
"""

import gzip
import io
import os
import re
import shutil
import sqlite3
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from PIL import Image, UnidentifiedImageError

from agevlm.data.rows import resolve_inside
from agevlm.images import open_image, open_stored
from agevlm.store import replacing

from .records import BadRow


MAX_FILE_BYTES = 256 * 2**20
# Cambrian-Alignment's archives hold the absolute path of the machine that packed them.
PUBLISHED_PREFIXES = ("mnt/disks/storage/data/pretrain_data/2.5m_v2/",)
TAR = re.compile(r"\.tar(?:[._-]?part.*)?$", re.IGNORECASE)
_NAMED_LIKE = "SELECT container, path, start, size FROM files WHERE folded = ? ORDER BY rowid"
_PART = re.compile(r"[._-]?part.*$", re.IGNORECASE)
_UNUSUAL_MODES = ("CMYK", "YCbCr", "LAB", "HSV", "I", "F", "P", "PA", "1")
_SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "JPEG2000": {".jp2", ".j2k", ".jpx"},
    "MPO": {".jpg", ".jpeg", ".mpo"},
    "PPM": {".ppm", ".pgm", ".pbm", ".pnm"},
    "TIFF": {".tif", ".tiff"},
}


@dataclass(frozen=True)
class Found:
    """A picture's file: `container` is a root (with `path` below it) or an archive (with `offset` and `size` in it).

    `note`: (kind, detail) where it was not found as it was written."""

    container: int
    path: str
    offset: int | None = None
    size: int | None = None
    note: tuple[str, str] | None = None


class PictureStore:
    """Pictures below folders and in archives.

    Args:
        roots: folders, archives, or both.
        work: folder for the index and for what had to be unpacked; made when it is needed.

    Raises:
        ValueError: a root does not exist.
    """

    def __init__(self, roots: Sequence[str | Path], work: str | Path):
        self.folders: list[Path] = []
        self.named: list[Path] = []
        for root in map(Path, roots):
            if not root.exists():
                raise ValueError(f"{root} does not exist; give the folder, or the archives, that hold the pictures")
            (self.folders if root.is_dir() else self.named).append(root.absolute())
        self.work = Path(work)

    def read(self, path: str) -> tuple[bytes, tuple[str, str] | None]:
        """The bytes of a picture's file, and the note of `Found`.

        Raises:
            BadRow: there is none, or it cannot be read (`image_missing`, `image_path_outside`, ...).
        """
        found = self.find(path)
        place = self._place(found, path)
        try:
            return (place.read_bytes() if isinstance(place, Path) else place()), found.note
        except OSError as error:
            raise BadRow("image_unreadable", f"{path}: {error.strerror}") from None

    def stored(self, path: str) -> dict[str, Any]:
        """A picture as an undecoded column has it: the name of its file, or its bytes where it lies in an archive.

        Raises:
            BadRow: as `read`; the file itself is not read.
        """
        place = self._place(self.find(path), path)
        return {"bytes": None, "path": str(place)} if isinstance(place, Path) else {"bytes": place(), "path": None}

    def _place(self, found: Found, path: str) -> Path | Callable[[], bytes]:
        """The file of a picture, or what reads it from its archive. Raises `BadRow` as `read` does."""
        if found.offset is not None and found.size is not None:
            self._check_size(found.size, path)
            return partial(self._archives[found.container].read, found.offset, found.size)
        try:
            file = resolve_inside(self.folders[found.container], found.path)
            if not file.is_file():  # reading a pipe or a device may never end
                raise BadRow("image_unreadable", f"{path} is no regular file")
            self._check_size(file.stat().st_size, path)
        except ValueError as error:
            raise BadRow("image_path_outside", str(error)) from None
        except OSError as error:
            raise BadRow("image_unreadable", f"{path}: {error.strerror}") from None
        return file

    def find(self, path: str) -> Found:
        """Where a picture is. Raises `BadRow` as `read` does."""
        if any(len(os.fsencode(part)) > 255 for part in path.split("/")):
            raise BadRow("image_path_bad", f"{path[:100]!r} has a name of more than 255 bytes")
        outside = None
        for number, folder in enumerate(self.folders):
            try:
                if resolve_inside(folder, path).is_file():
                    return Found(number, path)
            except ValueError as error:
                outside = error
            except (OSError, RuntimeError) as error:  # a name too long, a loop of links
                raise BadRow("image_path_bad", f"{path[:100]!r}: {error}") from None
        wanted = _normal(path)
        if wanted is None:
            raise BadRow("image_path_outside", str(outside or f"{path!r} is not below an archive"))
        for prefix in ("", *PUBLISHED_PREFIXES):
            same = [Found(*values) for values in self._index.execute(_NAMED_LIKE, (_folded(prefix + wanted),))]
            exact = [found for found in same if found.path == prefix + wanted]
            if exact:
                note = ("image_relocated", f"{path} is {exact[0].path}") if prefix else None
                return Found(**{**vars(exact[0]), "note": note})
            if len({found.path for found in same}) > 1:
                raise BadRow("image_ambiguous", f"{path} may be {' or '.join(sorted(f.path for f in same)[:3])}")
            if same:
                return Found(**{**vars(same[0]), "note": ("image_miscased", f"{path} is {same[0].path}")})
        if outside is not None:
            raise BadRow("image_path_outside", str(outside))
        places = ", ".join(place.name for place in self.folders + self.named)
        raise BadRow("image_missing", f"{path} is in none of {places}; --images names the folder or its archives")

    def __getstate__(self) -> dict:
        """For other processes: connections and open archives stay behind."""
        return {name: value for name, value in vars(self).items() if name in ("folders", "named", "work")}

    @staticmethod
    def _check_size(size: int, path: str) -> None:
        if size > MAX_FILE_BYTES:
            raise BadRow("image_too_large", f"{path} has {size} bytes; the limit is {MAX_FILE_BYTES}")

    # ---- The index ----

    @cached_property
    def _archives(self) -> list["Archive"]:
        named = list(self.named)
        for folder in self.folders:
            named += sorted(path for path in folder.iterdir() if TAR.search(path.name) and path.is_file())
        groups: dict[Path, list[Path]] = {}
        for path in dict.fromkeys(named):
            if path.suffix == ".gz" or path.suffix == ".tgz":
                path = self._unpacked(path)
            groups.setdefault(path.with_name(_PART.sub("", path.name)), []).append(path)
        return [Archive(parts) for parts in groups.values()]

    def _unpacked(self, path: Path) -> Path:
        """A compressed archive cannot be read at random: decompressed, once."""
        target = self.work / f"{path.name}.tar"
        with FileLock(self.work / "unpack.lock"):
            if not target.exists():
                with replacing(target) as partial, gzip.open(path) as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)
        return target

    @cached_property
    def _index(self) -> sqlite3.Connection:
        """The names of all files. Built by the process that needs it first, while the others wait."""
        self.work.mkdir(parents=True, exist_ok=True)
        target = self.work / "pictures.sqlite"
        with FileLock(self.work / "index.lock"):
            if not target.exists():
                with replacing(target) as partial, closing(sqlite3.connect(partial)) as index, index:
                    index.execute("CREATE TABLE files (folded, path, container INTEGER, start INTEGER, size INTEGER)")
                    index.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?)", self._files())
                    index.execute("CREATE INDEX by_name ON files (folded)")
        return sqlite3.connect(f"{target.absolute().as_uri()}?mode=ro", uri=True)

    def _files(self) -> Iterator[tuple[str, str, int, int | None, int | None]]:
        for number, folder in enumerate(self.folders):
            for parent, _, names in os.walk(folder):
                below = PurePosixPath(Path(parent).relative_to(folder))
                for name in names:
                    path = str(below / name)
                    if _storable(path):
                        yield _folded(path), path, number, None, None
        for number, archive in enumerate(self._archives):
            for name, offset, size in archive.members():
                inside = _normal(name)
                if inside is not None and _storable(inside):
                    yield _folded(inside), inside, number, offset, size


class Archive:
    """A tar file, or the parts of one in the order of their numbers, read at random."""

    def __init__(self, parts: Sequence[Path]):
        self.parts = sorted(
            parts, key=lambda path: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", path.name)]
        )
        self._files = [path.open("rb", buffering=0) for path in self.parts]
        self._ends = list(accumulate(path.stat().st_size for path in self.parts))

    def members(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of the files in the archive.

        Raises:
            ValueError: it is damaged or incomplete.
        """
        try:
            with tarfile.open(fileobj=io.BufferedReader(_Joined(self)), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    if member.isreg():
                        yield member.name, member.offset_data, member.size
                    tar.members = []  # type: ignore[attr-defined]  # it would keep every header it has seen
        except tarfile.TarError as error:
            names = ", ".join(path.name for path in self.parts)
            raise ValueError(f"{names}: no complete tar archive ({error}); download it again") from error

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the end."""
        pieces, start = [], 0
        for file, end in zip(self._files, self._ends, strict=True):
            if offset < end and size > 0:
                piece = os.pread(file.fileno(), min(size, end - offset), offset - start)
                pieces.append(piece)
                offset, size = offset + len(piece), size - len(piece)
            start = end
        return b"".join(pieces)


class _Joined(io.RawIOBase):
    """The parts of an archive as one file."""

    def __init__(self, archive: Archive):
        self._archive, self._at = archive, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._archive._ends[-1])[whence]
        return self._at

    def readinto(self, buffer) -> int:
        data = self._archive.read(self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _normal(path: str) -> str | None:
    """A relative path without `.` and repeated slashes; None where it is absolute or goes up."""
    parts = PurePosixPath(path).parts
    return None if not parts or parts[0] == "/" or ".." in parts else "/".join(parts)


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _storable(path: str) -> bool:
    """File names are bytes; those that are no UTF-8 cannot be meant by a row."""
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


# ---- What is in a file ----


def decode_picture(data: bytes, path: str) -> tuple[Image.Image, list[tuple[str, str]]]:
    """The picture in RGB, decoded completely as training will decode it, and what is remarkable about its file.

    Raises:
        BadRow: `image_empty`, `image_not_a_picture`, `image_corrupt` or `image_too_large`.
    """
    if not data:
        raise BadRow("image_empty", path)
    try:
        picture, notes = open_image(data, path), _remarks(data, path)
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise BadRow("image_not_a_picture", path) from None
        too_large = "exceed the limit" in str(error) or isinstance(error.__cause__, Image.DecompressionBombError)
        raise BadRow("image_too_large" if too_large else "image_corrupt", str(error)) from None
    except Exception as error:  # damaged headers make Pillow raise nearly anything
        raise BadRow("image_corrupt", f"{path}: {type(error).__name__}: {error}") from None
    return picture, notes


def _remarks(data: bytes, path: str) -> list[tuple[str, str]]:
    notes: list[tuple[str, str]] = []
    with open_stored(data, path) as file:
        width, height = file.size
        if getattr(file, "is_animated", False) and file.format != "MPO":  # which holds a second view
            notes.append(("image_animated", path))
        if file.mode in _UNUSUAL_MODES or ";" in file.mode:
            notes.append(("image_unusual_mode", f"{path} is {file.mode}"))
        kind = file.format or ""  # an opened file has one
        suffixes = _SUFFIXES.get(kind, {f".{kind.lower()}"})
        suffix = os.path.splitext(path)[1].lower()
        if suffix and suffix not in suffixes:
            notes.append(("image_wrong_suffix", f"{path} is {kind}"))
    if min(width, height) < 8:
        notes.append(("image_tiny", f"{path} is {width} x {height}"))
    elif max(width, height) > 20 * min(width, height):
        notes.append(("image_elongated", f"{path} is {width} x {height}"))
    return notes
