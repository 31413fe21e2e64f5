"""Hands readers what no sane writer makes; a process of its own, so that its memory can be measured.

    python tests/helpers/fuzz_worker.py FOLDER KIND COUNT SEED

KIND is `pictures`, `records`, `rows`, `questions` or `checkpoints`. Prints one JSON line: how many were `accepted` and
`refused`, the slowest in `seconds`, the peak of memory in `megabytes`, and `wrong`: errors that are no ValueError, or
name no place.
"""

import json
import random
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bad_rows import corpus, encoded, photo, write_pictures
from PIL import Image


WHERE = "row 7"
ODD = [None, True, -1, 0, 1, 2**31, 10**12, 10**400, 1e308, float("nan"), "", "x", "\0", "\ud800", "<image>",
       "<|image|>", "../../etc/passwd", "a" * 5000, [], [[]], {}, {"a": None}, [None, 1]]  # fmt: skip
Case = tuple[str, Callable[[], object]]  # what an error must name, the reading


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changes, more of them near the beginning."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(found), rng.choice((16, 64, 10**9))) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            found[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0"))
        elif kind == 2:
            del found[rng.randrange(len(found) + 1) :]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.randint(1, 40))
        elif kind == 4:
            found[at : at + 20] = bytes(20)
        else:
            start = rng.randrange(len(found) + 1)
            found[at:at] = found[start : start + rng.randint(1, 200)]
    return bytes(found)


def twisted(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part replaced, removed, renamed or repeated."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        changed = rng.choice(([], [value[at]] * 3, [twisted(value[at], rng)]))
        return [*value[:at], *changed, *value[at + 1 :]]
    name = rng.choice(list(value))
    rest = {key: part for key, part in value.items() if key != name}
    kind = rng.randrange(6)
    return rest if kind == 0 else {**rest, name + "x": value[name]} if kind == 1 else {
        **value, name: twisted(value[name], rng)}  # fmt: skip


# ---- Readers ----


def pictures(folder: Path, count: int, rng: random.Random) -> Iterator[Case]:
    from agevlm.images import FORMATS, open_header, open_image
    from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessorPil

    processor, samples = AgeVlmImageProcessorPil(), []
    deep = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)
    for kind in FORMATS:
        for image in (photo(), photo().convert("L"), photo().convert("P"), photo().convert("RGBA"),
                      photo().convert("1"), photo().convert("CMYK"), deep):  # fmt: skip
            try:
                samples.append(encoded(image, kind))
            except (OSError, ValueError):
                continue  # the format has no such pictures
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif = Image.Exif()
        exif[0x0112] = 6
        samples.append(encoded(photo(), kind, exif=exif.tobytes()))

    def travelling(data: bytes) -> None:
        path = folder / "picture"
        path.write_bytes(data)
        processor.process_image(processor.fetch_images(str(path)), processor.max_pixels, True, True)

    for _ in range(count):
        data = damaged(rng.choice(samples), rng)
        yield WHERE, lambda data=data: open_image(data, WHERE)
        yield WHERE, lambda data=data: open_image(data, WHERE, mode="1")
        yield WHERE, lambda data=data: open_header(data, WHERE)
        yield "", lambda data=data: travelling(data)


def records(folder: Path, count: int, rng: random.Random) -> Iterator[Case]:
    """One file, of which each row is converted, or listed by its number."""
    from agevlm.data.published.check import check
    from agevlm.data.published.convert import convert

    root = folder / "data"
    write_pictures(root, folder / "outside")
    known = [case.line for case in corpus(folder / "outside") if len(case.line) < 100_000]
    lines = []
    for _ in range(count):
        line = rng.choice(known)
        try:
            line = json.dumps(twisted(json.loads(line), rng)).encode()
        except (ValueError, RecursionError):
            line = damaged(line, rng)
        if rng.random() < 0.2:
            line = damaged(line, rng)
        lines.append(line.replace(b"\n", b" ").replace(b"\r", b" ") or b"{")
    (root / "rows.jsonl").write_bytes(b"\n".join(line if line.strip() else b"{" for line in lines))

    def examine() -> None:
        report = check(root / "rows.jsonl", progress=False, out=folder / "report")
        summary = convert(root / "rows.jsonl", folder / "out", progress=False)
        listed = [json.loads(line) for line in (folder / "out" / "bad_rows.jsonl").open()]
        assert report["rows_read"] == count, report["rows_read"]
        assert report["rows_good"] == summary["rows"] == count - len(listed), (report["rows_good"], summary["rows"])
        assert all(1 <= line["row"] <= count and line["kind"] for line in listed)

    yield "rows.jsonl", examine


def rows(folder: Path, count: int, rng: random.Random) -> Iterator[Case]:
    from agevlm.data.rows import open_row
    from builders import row, stored

    good = row("r", images=2, guided=True)
    good["images"] = [stored(image) for image in good["images"]]
    good["guidance"]["mask"] = stored(good["guidance"]["mask"])
    for _ in range(count):
        bad = good
        for _ in range(rng.randint(1, 3)):
            bad = twisted(bad, rng)
        bad = bad if isinstance(bad, dict) else {}
        yield WHERE, lambda bad=bad: open_row(bad, WHERE)


def questions(folder: Path, count: int, rng: random.Random) -> Iterator[Case]:
    """Files of twenty rows, read, prepared and scored."""
    from benchmark_rows import ROWS

    from agevlm.evaluation.inputs import without_pictures
    from agevlm.evaluation.registry import BENCHMARKS
    from agevlm.evaluation.sources import load_local

    def scored(benchmark: Any, rows: Any) -> None:
        known = list(without_pictures(rows))
        said = [benchmark.parse(row, rng.choice(("yes", "B", benchmark.prompt(row), ""))) for row in known]
        benchmark.score(known, said)

    for number in range(count // 20):
        name, good = rng.choice(list(ROWS.items()))
        benchmark = BENCHMARKS[name]["paper"]
        many = [twisted(good, rng) if rng.random() < 0.1 else {**good, "id": f"{number}-{n}"} for n in range(20)]
        path = folder / f"{benchmark.name}.json"
        path.write_text(json.dumps(many))
        yield path.name, lambda benchmark=benchmark, path=path: scored(benchmark, load_local(benchmark, path))


def checkpoints(folder: Path, count: int, rng: random.Random) -> Iterator[Case]:
    from agevlm.models import load
    from builders import save_tiny

    good = save_tiny(folder / "good")
    names = sorted(path.name for path in good.iterdir() if path.suffix != ".py" and path.name != "README.md")
    bad = folder / "bad"
    for _ in range(count):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        path = bad / rng.choice(names)
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(twisted(json.loads(path.read_text()), rng)))
        elif rng.random() < 0.05:
            path.unlink()
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))
        yield str(bad), lambda: load(bad, ours=True)


# ---- What came of it ----


def main(folder: Path, kind: str, count: int, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    accepted = refused = 0
    slowest, wrong = 0.0, []
    cases = {"pictures": pictures, "records": records, "rows": rows, "questions": questions,
             "checkpoints": checkpoints}[kind]  # fmt: skip
    for number, (named, read) in enumerate(cases(folder, count, random.Random(seed))):
        begun = time.monotonic()
        try:
            read()
            accepted += 1
        except ValueError as error:
            refused += 1
            if type(error) is not ValueError and not type(error).__module__.startswith("agevlm"):
                wrong.append(f"{number}: {type(error).__name__}: {error}"[:500])
            elif named not in str(error) or not str(error).strip():
                wrong.append(f"{number}: names no {named}: {error}"[:500])
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"{number}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:700])
        slowest = max(slowest, time.monotonic() - begun)
    # Not `ru_maxrss`, which begins with the memory of the process that started this one
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
    print(json.dumps({"accepted": accepted, "refused": refused, "seconds": round(slowest, 2), "megabytes": peak,
                      "wrong": wrong}))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
