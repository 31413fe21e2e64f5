"""A corpus of bad rows and pictures: writes a LLaVA-style JSONL with its pictures, and knows what each row is called.

A case is (name, what the doctor must call it, whether a conversion keeps the row, its line). Lines are bytes, because
some are no JSON at all.
"""

import base64
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Case(NamedTuple):
    name: str
    kinds: tuple[str, ...]  # in alphabetical order; text_only, multi_image and duplicate_picture left out
    kept: bool
    line: bytes


def photo(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth noise: has structure, as a difference hash wants it, and no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb_png(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of a few bytes that claims 900 million pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def write_pictures(root: Path, outside: Path) -> None:
    """The folder `pictures` of the corpus below `root`, with a link out of it to `outside`."""
    folder = root / "pictures"
    folder.mkdir(parents=True)
    outside.mkdir(parents=True)
    jpeg = encoded(photo(1), "JPEG", quality=90)
    frames = [photo(seed).convert("P") for seed in (2, 3)]
    files = {
        "good.jpg": encoded(photo(0), "JPEG"),
        "good2.jpg": encoded(photo(9), "JPEG"),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": encoded(photo(4), "PNG")[:-300],
        "zero.jpg": b"",
        "text.png": b"<html>404 not found</html>",
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(photo(5).convert("CMYK"), "JPEG"),
        "grey16.png": encoded(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "PNG"),
        "palette.png": encoded(photo(6).convert("P"), "PNG"),
        "one.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "long.png": encoded(photo(7, (900, 9)), "PNG"),
        "bomb.png": bomb_png(),
        "really_a_png.jpg": encoded(photo(8), "PNG"),
        "Case.JPG": encoded(photo(10), "JPEG"),
        "twin.jpg": encoded(photo(11), "JPEG"),
        "TWIN.jpg": encoded(photo(12), "JPEG"),
        "cafe\u0301.jpg": encoded(photo(13), "JPEG"),  # as a Mac unpacks it
        "rgba.png": encoded(photo(14).convert("RGBA"), "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "a_folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (outside / "secret.jpg").write_bytes(files["good.jpg"])
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "linked").symlink_to(outside)
    moved = root / "mnt/disks/storage/data/pretrain_data/2.5m_v2/allava"
    moved.mkdir(parents=True)
    (moved / "a.jpg").write_bytes(encoded(photo(15), "JPEG"))


def turns(question: Any = "<image>\nWhat is this?", answer: Any = "A photo.") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def corpus(outside: Path) -> list[Case]:
    """All cases, in the order of the file."""
    cases: list[Case] = []

    def add(name: str, kinds: str | tuple[str, ...], kept: bool, line: Any = None, **fields: Any) -> None:
        """A case by its line, or by what differs from a good row; a field of `...` is left out."""
        if line is None:
            row = {"id": f"case-{len(cases)}", "image": "pictures/good.jpg", "conversations": turns(), **fields}
            line = json.dumps({key: value for key, value in row.items() if value is not ...}).encode()
        cases.append(Case(name, (kinds,) if isinstance(kinds, str) else kinds, kept, line))

    def picture(path: Any, kinds: str | tuple[str, ...], kept: bool, name: str | None = None) -> None:
        add(name or str(path), kinds, kept, image=path)

    text_only, brief = turns("Hello?"), {"from": "system", "value": "Be brief."}
    # Good rows, among them what only looks odd
    add("good", (), True)
    add("text only", (), True, image=..., conversations=text_only)
    for nothing in ("", "None", "nan", None, [], float("nan")):
        add(f"no picture: {nothing!r}", (), True, image=nothing, conversations=text_only)
    add("two pictures", (), True, image=["pictures/good.jpg", "./pictures/good2.jpg"],
        conversations=turns("Compare <image> with <image>."))  # fmt: skip
    add("placeholder behind the question", (), True, conversations=turns("What is this?\n<image>"))
    add("system turn first", (), True, conversations=[brief, *turns()])
    odd = turns("<image>\n\u202eاسم؟ e\u0301 👩‍👩‍👧 \u200b", "日本語 🎉 \u2028 ¯\\_(ツ)_/¯")
    add("unicode", (), True, conversations=odd)
    bom = b"\xef\xbb\xbf" + json.dumps({"id": "bom", "conversations": text_only}).encode()
    add("BOM in a line", (), True, line=bom)
    add("rgba", (), True, image="pictures/rgba.png")
    # The file
    add("no JSON", "invalid_json", False, line=b'{"id": "x", "conversations": [}')
    add("deeply nested", "invalid_json", False, line=b"[" * 100_000)
    add("endless number", "invalid_json", False, line=b'{"id": ' + b"9" * 5_000 + b"}")
    add("array line", "not_an_object", False, line=json.dumps([{"id": "x", "conversations": text_only}]).encode())
    add("string line", "not_an_object", False, line=b'"a text"')
    add("no UTF-8", "invalid_encoding", False, line=b'{"id": "x\xff"}')
    add("half a surrogate pair", "invalid_encoding", False, conversations=turns("<image> \ud83d"))
    add("UTF-16", ("invalid_encoding",), False, line='{"id": "x"}'.encode("utf-16-be").replace(b"\n", b"") + b"\xd8")
    add("too long", "record_too_long", False, image=..., conversations=turns("x" * (16 * 2**20 + 10)))
    # Ids
    add("id null", "id_missing", True, id=None)
    add("no id", "id_missing", True, id=...)
    add("id a number", "id_not_text", True, id=31337)
    add("id a fraction", "bad_id", False, id=1.5)
    add("id true", "bad_id", False, id=True)
    add("id a list", "bad_id", False, id=["a"])
    add("id again, other row", "duplicate_id", True, id="case-0", conversations=turns("<image>\nAnd this?"))
    add("row again", "duplicate_row", False, id="case-0")
    # Conversations
    add("no conversations", "no_conversations", False, conversations=...)
    add("empty conversations", "no_conversations", False, conversations=[])
    add("conversations a text", "no_conversations", False, conversations="<image>")
    add("turn null", "bad_turn", False, conversations=[None, *turns()])
    add("turn without value", "bad_turn", False, conversations=[{"from": "human"}, turns()[1]])
    add("from nobody", "bad_role", False, conversations=[{**turns()[0], "from": "bing"}, turns()[1]])
    add("from null", "bad_role", False, conversations=[{**turns()[0], "from": None}, turns()[1]])
    add("value a number", "bad_text", False, conversations=turns(answer=42))
    add("value null", "bad_text", False, conversations=turns(answer=None))
    add("value nested", "bad_text", False, conversations=turns(answer=[{"type": "table"}]))
    add("system turn last", "system_not_first", False, conversations=[*turns(), brief])
    add("human twice", "turns_not_alternating", False, conversations=[turns()[0], *turns("Again?")])
    add("gpt first", "turns_not_alternating", False, conversations=turns()[::-1])
    add("ends with human", "no_answer", False, conversations=[*turns(), {"from": "human", "value": "And?"}])
    add("system alone", "no_answer", False, image=..., conversations=[brief])
    add("empty answer", "empty_answer", False, conversations=turns(answer=" \n"))
    add("empty question", "empty_question", False, image=..., conversations=turns(""))
    add("NUL in a text", "nul_character", False, conversations=turns(answer="a\0b"))
    add("end of turn in a text", "special_token", False, conversations=turns(answer="Yes<|eot_id|>"))
    add("our placeholder in a text", "special_token", False, conversations=turns("<image><|image|>"))
    # Other media
    for name, value in {
        "video": "v.mp4",
        "videos": ["v.mp4"],
        "audio": {"path": "a.wav"},
        "point_cloud": "p.npy",
    }.items():
        add(f"field {name}", "other_medium", False, image=..., conversations=text_only, **{name: value})
    add("no video", (), True, video=None, audio=[], video_path="")
    add("video and picture", "other_medium", False, video="v.mp4")
    add("video in the text", "other_medium", False, image=..., conversations=turns("<video>\nWhat happens?"))
    add("video behind the text", "other_medium", False, image=..., conversations=turns("What happens?\n<video>"))
    add("a tag named", (), True, image=..., conversations=turns("What does the tag <video> do in HTML?"))
    part = [{"type": "input_audio", "input_audio": {}}, {"type": "text", "text": "What is said?"}]
    add("sound in a part", "other_medium", False, image=..., conversations=turns(part))
    # Other names and forms
    asked, said = {"role": "user", "content": "<image>\nWho?"}, {"role": "assistant", "content": "A cat."}
    data = base64.b64encode(encoded(photo(20), "JPEG")).decode()
    other = {"conversations": ...}
    add("roles in conversations", (), True, conversations=[asked, said])
    add("speakers in messages", (), True, **other, messages=turns())
    add("conversation", (), True, **other, conversation=turns())
    add("conversations as text", (), True, conversations=json.dumps(turns()))
    add("prompt of turns", (), True, **other, prompt=[asked], completion=[said])
    add("prompt", "placeholder_added", True, **other, prompt="Who?", completion="A cat.")
    add("query", (), True, **other, query="<image>Who?", response="A cat.")
    add(
        "query with a history",
        "no_conversations",
        False,
        **other,
        query="Who?",
        response="A cat.",
        history=[["a", "b"]],
    )
    add("texts", "placeholder_added", True, **other, texts=[{"user": "Who?", "assistant": "A cat."}])
    add("instruction", "no_conversations", False, **other, instruction="Who?", output="A cat.")
    for name in ("image_path", "img", "picture"):
        add(name, (), True, image=..., **{name: "pictures/good.jpg"})
    add("data address", (), True, image=f"data:image/jpeg;base64,{data}")
    add("base64", (), True, image=data)
    add("broken base64", "bad_image_field", False, image=f"data:image/jpeg;base64,{data[:-5]}")
    address = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "text", "text": "Who?"},
    ]
    add("picture in a part", (), True, image=..., conversations=turns(address))
    path = [{"type": "image", "image": "pictures/good.jpg"}, {"type": "text", "text": "Who?"}]
    add("path in a part", (), True, image=..., conversations=turns(path))
    add("system", (), True, system="Be brief.")
    add("system repeated", (), True, system="Be brief.", conversations=[brief, *turns()])
    add("two systems", "system_not_first", False, system="Be long.", conversations=[brief, *turns()])
    add("tools", "field_ignored", True, tools="[{}]")
    add("weight", "field_ignored", True, conversations=[turns()[0], {**turns()[1], "weight": 0}])
    # Placeholders
    add("picture without placeholder", "placeholder_added", True, conversations=turns("What is this?"))
    add("placeholder without picture", "placeholder_mismatch", False, image=...)
    add("placeholder in two turns", "placeholder_mismatch", False, conversations=[*turns(), *turns()])
    add("three for two", "placeholder_mismatch", False, image=["pictures/good.jpg"] * 2,
        conversations=turns("<image><image><image>"))  # fmt: skip
    add("placeholder in the answer", "placeholder_in_answer", False, conversations=turns("What?", "<image>"))
    # The field image
    picture([None], "null_image", False, "list of nulls")
    picture(["pictures/good.jpg", ""], "null_image", False, "list with an empty name")
    picture(7, "bad_image_field", False, "image a number")
    picture([["pictures/good.jpg"]], "bad_image_field", False, "image nested")
    picture({"url": "x"}, "bad_image_field", False, "image an object")
    picture("https://example.com/a.jpg", "image_url", False)
    # Paths
    picture("pictures/nowhere.jpg", "image_missing", False)
    picture("pictures/a_folder.jpg", "image_missing", False, "a folder")
    picture("pictures/pipe.jpg", "image_unreadable", False, "a pipe")
    picture("../outside/secret.jpg", "image_path_outside", False, "path goes up")
    picture(str(outside / "secret.jpg"), "image_path_outside", False, "absolute path")
    picture("pictures/link.jpg", "image_path_outside", False, "link to a file outside")
    picture("pictures/linked/secret.jpg", "image_path_outside", False, "link to a folder outside")
    picture("x" * 300, "image_path_bad", False, "name too long")
    picture("pictures/a\0.jpg", "nul_character", False, "NUL in a path")
    picture("Pictures/case.jpg", "image_miscased", True)
    picture("pictures/caf\u00e9.jpg", "image_miscased", True, "other Unicode form")
    picture("pictures/Twin.jpg", "image_ambiguous", False)
    picture("allava/a.jpg", "image_relocated", True)
    # Pictures
    picture("pictures/truncated.jpg", "image_corrupt", False)
    picture("pictures/cut.png", "image_corrupt", False)
    picture("pictures/zero.jpg", "image_empty", False)
    picture("pictures/text.png", "image_not_a_picture", False)
    picture("pictures/page.eps", "image_not_a_picture", False)
    picture("pictures/bomb.png", "image_too_large", False)
    picture("pictures/animated.gif", ("image_animated", "image_unusual_mode"), True)
    picture("pictures/cmyk.jpg", "image_unusual_mode", True)
    picture("pictures/grey16.png", "image_unusual_mode", True)
    picture("pictures/palette.png", "image_unusual_mode", True)
    picture("pictures/one.png", "image_tiny", True)
    picture("pictures/long.png", "image_elongated", True)
    picture("pictures/really_a_png.jpg", "image_wrong_suffix", True)
    # Length
    add("huge text", "too_long", True, conversations=turns(answer="word " * 600))
    add("picture behind the cut", ("image_behind_cut", "too_long"), True,
        conversations=[*turns("Read: " + "word " * 600, "Done."), *turns()])  # fmt: skip
    # The end of the file is cut off
    add("truncated last line", "invalid_json", False, line=b'{"id": "last", "image": "pictures/goo')
    return cases


def write_corpus(folder: Path) -> tuple[Path, list[Case]]:
    """Writes rows.jsonl and its pictures into `folder`/data; returns the file and the cases."""
    root, outside = folder / "data", folder / "outside"
    write_pictures(root, outside)
    cases = corpus(outside)
    (root / "rows.jsonl").write_bytes(b"\n".join(case.line for case in cases))
    assert os.path.getsize(root / "rows.jsonl") > 0
    return root / "rows.jsonl", cases
