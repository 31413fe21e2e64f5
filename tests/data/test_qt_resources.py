"""Archives of Qt resources: all formats are read, and whatever is damaged is refused by name."""

import struct
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qt_archive import packed, qt_archive

from agevlm.data.scenes.qt_resources import read_resources


FILES = {"a/b/red.txt": b"red " * 300, "a/b/blue.txt": b"", "a/\u00e9t\u00e9": b"summer", "README": bytes(range(256))}
ARCHIVES = [qt_archive(FILES, form, way) for form in (1, 2, 3) for way in ("plain", "zlib", "zstd")]
NODE = struct.Struct(">IHII8x")


@pytest.fixture
def read(tmp_path):
    def read(content: bytes, **options) -> dict[str, bytes]:
        path = tmp_path / "some.rcc"
        path.write_bytes(content)
        return read_resources(path, **options)

    return read


def test_all_formats_are_read(read):
    for archive in ARCHIVES:
        assert read(archive) == FILES
    assert read(qt_archive({})) == {}


def test_an_archive_cut_anywhere_is_refused(read):
    for archive in ARCHIVES:
        for length in [*range(0, len(archive), 7), len(archive) - 1]:
            with pytest.raises(ValueError, match=r"some\.rcc cannot be read as a Qt resource archive \(.*; fetch it"):
                read(archive[:length])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ARCHIVES), st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8))))
def test_a_damaged_archive_is_read_or_refused_by_name(read, archive, changes):
    content = bytearray(archive)
    for place, new in changes:
        place %= len(content)
        content[place : place + len(new)] = new[: len(content) - place]
    try:
        found = read(bytes(content), most_bytes=10_000)
    except ValueError as error:
        assert "some.rcc" in str(error)
    else:
        assert sum(map(len, found.values())) <= 10_000


def nodes(*rows: tuple[int, int, int, int], names: bytes = b"", data: bytes = b"") -> bytes:
    """An archive of format 2 out of nodes: place of the name, flags, two numbers."""
    header = struct.pack(">4s4I", b"qres", 2, 20 + len(data + names), 20, 20 + len(data))
    return header + data + names + b"".join(NODE.pack(*row) for row in rows)


def name(text: str) -> bytes:
    return struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")


ROOT, A = (0, 2, 1, 1), name("a")


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (b"", "header at byte 0 ends outside"),
        (b"PNG!" + bytes(40), "begins with b'PNG!'"),
        (struct.pack(">4s4I", b"qres", 4, 0, 0, 0), "format 4"),
        (nodes((0, 0, 0, 0), data=packed(b"x", "plain")), "first node is no folder"),
        (nodes((0, 2, 1, 0), names=A), "node 0 lies in two folders"),
        (nodes((0, 2, 2, 1), (0, 2, 1, 2), (0, 2, 0, 0), names=A), "node 2 lies in two folders"),
        (nodes((0, 2, 2**32 - 1, 2**32 - 1)), "node at byte .* ends outside"),
        (nodes((0, 2, 2, 1), (0, 0, 1, 0), (0, 0, 1, 0), names=A, data=packed(b"x", "plain")), "holds 'a' twice"),
        (nodes(ROOT, (900, 0, 1, 0), names=A), "name at byte .* ends outside"),
        (nodes(ROOT, (0, 0, 1, 0), names=struct.pack(">HI", 65535, 0)), "name at byte .* ends outside"),
        (nodes(ROOT, (0, 0, 1, 0), names=struct.pack(">HI", 1, 0) + b"\xd8\x00"), "utf-16"),
        *((nodes(ROOT, (0, 0, 1, 0), names=name(bad)), "which no file can have") for bad in ("", "..", "x/y", "a\0")),
        (nodes(ROOT, (0, 0, 1, 900), names=A), "length at byte .* ends outside"),
        (nodes(ROOT, (0, 0, 1, 0), names=A, data=struct.pack(">I", 500)), "data at byte .* ends outside"),
        (nodes(ROOT, (0, 5, 1, 0), names=A, data=packed(b"x", "plain")), "'a' has the flags 5"),
        (nodes(ROOT, (0, 1, 1, 0), names=A, data=packed(b"\0\0\0\1xyz", "plain")), "decompress"),
        (nodes(ROOT, (0, 1, 1, 0), names=A, data=packed(b"\0\0\0\7" + zlib.compress(b"x"), "plain")), "its length"),
        (nodes(ROOT, (0, 1, 1, 0), names=A, data=packed(b"\0\0\0\1" + zlib.compress(b"x") + b"y", "plain")),
         "its length"),
        (nodes(ROOT, (0, 4, 1, 0), names=A, data=packed(b"xyz", "plain")), "ZSTD"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(read, archive, message):
    with pytest.raises(ValueError, match=rf"some\.rcc .*{message}"):
        read(archive)


@pytest.mark.parametrize("way", ["plain", "zlib", "zstd"])
def test_bombs_are_refused(read, way):
    """One large file, and many nodes that share one."""
    large = qt_archive({"a": bytes(1_000_000)}, way=way)
    many = nodes((0, 2, 50, 1), *[(8 * i, {"plain": 0, "zlib": 1, "zstd": 4}[way], 1, 0) for i in range(50)],
                 names=b"".join(name(chr(97 + i)) for i in range(50)), data=packed(bytes(30_000), way))  # fmt: skip
    for archive in (large, many):
        assert len(archive) < 40_000 or way == "plain"
        with pytest.raises(ValueError, match=r"some\.rcc .*limit"):
            read(archive, most_bytes=100_000)
    assert len(read(many)) == 50


def test_folders_in_folders_do_not_make_long_names(read):
    deep = nodes(*[(0, 2, 1, i + 1) for i in range(1000)], (0, 2, 0, 0), names=name("x" * 30))
    with pytest.raises(ValueError, match="which no file can have"):
        read(deep)
    wide = nodes((0, 2, 999, 1), *[(0, 2, 0, 0)] * 999, names=name("x" * 900))
    with pytest.raises(ValueError, match="limit"):
        read(wide, most_bytes=100_000)
