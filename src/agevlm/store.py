"""Files that survive an interruption: whole or absent, folders that know what they hold, journals, digests.

A file or folder is written under a temporary name beside its place and renamed at the end. A journal is appended to
and synced; a torn end that a kill leaves is cut off when it is opened again. The promise is against killed processes:
a power cut may lose data that the operating system has not written yet, except in journals.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open


# How a file begins that is no text in UTF-8, and what to do
_NO_TEXT = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"PAR1", "is a Parquet file; name it .parquet"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(_UMASK)


# ---- Whole or absent ----


def publish(source: Path, target: Path) -> None:
    """Renames a finished file, or a finished folder whose place is free, to `target` in one step.

    Files that a library has closed to other users (safetensors) get the permissions that this process gives its own.
    """
    for path in source.rglob("*") if source.is_dir() else [source]:
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o666 & ~_UMASK))
    os.replace(source, target)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for a file (same suffix), renamed to `path` at the end and removed if the block fails.

    One writer at a time, the others wait; the remains of a killed one are overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.incomplete{path.suffix}")
    place = _own(temporary)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(place)


def _own(path: Path) -> int:
    """Opens an empty file that no other process has open this way; waits for one that has."""
    while True:
        place = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(place, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(place), os.stat(path)):
                os.ftruncate(place, 0)
                return place
        os.close(place)  # who had it has renamed or removed it


def check_free(folder: Path) -> None:
    """Raises ValueError if no new folder can be made there: a file lies there, or a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already. Choose a new folder.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, renamed to it at the end and removed if the block fails.

    Raises:
        ValueError: another process is writing this folder.
    """
    temporary = path.with_name(f".{path.name}.incomplete")
    temporary.mkdir(parents=True, exist_ok=True)
    place = os.open(temporary, os.O_RDONLY)
    try:
        _lock(place, path)
        for entry in temporary.iterdir():  # of a run that was killed
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            yield temporary
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(place)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[Path]:
    """A folder, made if missing, that one process at a time works in; the others wait.

    Without `wait`, folders that were made and stay empty go again: a refused command leaves nothing.

    Raises:
        ValueError: another process works in it, and `wait` is False.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        if wait:
            fcntl.flock(place, fcntl.LOCK_EX)
        else:
            _lock(place, folder)
        yield folder
    finally:
        os.close(place)
        with suppress(OSError):  # the first that is not empty ends it
            for empty in made if not wait else ():
                empty.rmdir()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSON lines."""
    write_text(path, "".join(map(_line, rows)))


def check_text(path: Path) -> None:
    """Raises ValueError, naming the file, its form and the fix, if it begins as no text in UTF-8 does."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(_UTF16) or [head[::2], head[1::2]].count(b"\0\0") == 1:  # letters of ASCII without a mark
        raise ValueError(f"{path} is UTF-16; store it as UTF-8")
    for start, found in _NO_TEXT:
        if head.startswith(start):
            raise ValueError(f"{path} {found}")


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8, without the mark that some editors put in front.

    Raises:
        ValueError: `check_text` refuses the file; other bytes that are no UTF-8, unless `errors` says what of them.
    """
    check_text(path)
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 (byte {error.start}: {error.reason}); store it as UTF-8") from error


def read_json(path: Path) -> Any:
    """Raises ValueError, naming the file, if it is no JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Restore it, or delete it.") from error


def read_table(path: Path) -> dict[str, Any]:
    """The fields of a JSON file, empty where there is no file. Raises ValueError, naming it, if it holds none."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no table of fields but {type(content).__name__}. Restore it, or delete it.")
    return content


# ---- What a folder holds ----


def as_json(value: Any) -> Any:
    """`value` as it reads back from JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def changed_fields(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """`field: old there, new asked` for all values that differ, fields of nested mappings joined with a dot."""
    old, new = dict(flatten(there)), dict(flatten(asked))
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} asked" for name in names if old.get(name) != new.get(name)
    ]


def check_same(place: Path, there: Mapping[str, Any], asked: Mapping[str, Any], what: str = "run") -> None:
    """Compares the work recorded at `place` with the one asked for.

    Raises:
        ValueError: they differ; the message names `place` and all that differs.
    """
    if changed := changed_fields(there, as_json(asked)):
        raise ValueError(f"{place} holds another {what} ({'; '.join(changed)}); choose another folder or delete it")


def claim(file: Path, identity: Mapping[str, Any], what: str = "run") -> bool:
    """Records the purpose of the folder of `file`, or finds the same one there (`check_same`).

    Returns:
        Whether it was there: the work can be resumed.

    Raises:
        ValueError: the folder is for something else.
    """
    if file.is_file():
        check_same(file.parent, read_json(file), identity, what)
        return True
    write_json(file, identity)
    return False


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of nested mappings, names joined with a dot."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---- Journals ----


def whole_lines(path: Path) -> int:
    """Bytes of a file up to its last line break."""
    return path.read_bytes().rfind(b"\n") + 1


def read_lines(path: Path) -> list[Any]:
    """The whole lines of a journal; a torn last one is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {line[:80]!r}; delete the file") from error
    return rows


class Journal:
    """Appends to a file; rows are on the disk when `append` returns. One writer at a time.

    Args:
        whole: length in bytes of the whole part of an existing file; the rest is cut off. Default: JSON lines.

    Raises:
        ValueError: another process is writing to the file.
    """

    def __init__(self, path: Path, whole: Callable[[Path], int] = whole_lines):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)
        try:
            _lock(self.file.fileno(), path)
            self.file.truncate(whole(path))
        except BaseException:
            self.file.close()
            raise

    def append(self, rows: Iterable[Any]) -> None:
        """JSON lines."""
        self.write("".join(map(_line, rows)).encode())

    def write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:  # unbuffered files may write a part
            view = view[self.file.write(view) :]
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another run is writing to {path}; wait for it or stop it") from error


# ---- Weights ----


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, opened for torch; tensors are read when they are asked for.

    Raises:
        ValueError: the file is something else, or not complete.
    """
    try:
        tensors = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}). Restore or download it.") from error
    with tensors:
        yield tensors


# ---- Digests ----


def digest(content: bytes | str | Iterable[Any], size: int = 16) -> str:
    """blake2b, `size` bytes as hexadecimal digits, of text, bytes, or pieces of them one after the other."""
    result = hashlib.blake2b(digest_size=size)
    pieces: Iterable[Any] = (content,) if isinstance(content, (str, bytes)) else content
    for piece in pieces:
        result.update(piece.encode() if isinstance(piece, str) else piece)
    return result.hexdigest()
