"""Conversion and examination of published data on one core: rows per second, and memory as the file grows.

python bench/data.py [--megabytes 250 2000] [--pictures 1000] [--ids 10000000] [--folder FOLDER]

Memory is the peak of a process of its own (`VmHWM`; `ru_maxrss` counts its parent too), all imports included.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))
"""
CONVERT = """
import sys, time
from agevlm.data.published.convert import convert
start = time.process_time()
summary = convert(sys.argv[1], sys.argv[2], progress=False)
print(summary["read"], time.process_time() - start, peak())
"""
CHECK = """
import sys, time
from agevlm.data.published.check import check
start = time.process_time()
summary = check(sys.argv[1], progress=False)
print(summary["rows_read"], time.process_time() - start, peak())
"""
REPEATED = """
import sys, time
from pathlib import Path
from agevlm.data.published.convert import _find_repeated
from agevlm.data.published.json_records import Chunk
work = Path(sys.argv[1])
chunks = [Chunk(index, 0, 0, 0) for index in range(len(list(work.glob("ids-*.npy"))))]
before = peak()
start = time.process_time()
_find_repeated(work, chunks)
print(before, time.process_time() - start, peak())
"""


def run(code: str, *arguments: Path) -> tuple[float, float, float]:
    """The three numbers that a script prints."""
    printed = subprocess.check_output([sys.executable, "-c", PEAK + code, *map(str, arguments)], text=True)
    first, second, third = map(float, printed.split())
    return first, second, third


def show(what: str, rows: float, seconds: float, peak: float) -> None:
    print(f"{what}: {rows:,.0f} rows, {rows / seconds:,.0f} rows/s, peak {peak:.0f} MB", flush=True)


def write_text(path: Path, megabytes: int) -> None:
    """Rows of about 1 kB of text alone: of all files of a size, those with the most rows."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(1000)]
    size, index = 0, 0
    with path.open("w") as file:
        while size < megabytes * 10**6:
            text = " ".join(words[i] for i in rng.integers(0, 1000, 140))
            turns = [{"from": "human", "value": text[:200]}, {"from": "gpt", "value": text[200:]}]
            size += file.write(
                json.dumps({"id": f"row-{index}", "conversations": turns, "source": "text.json"}) + "\n"
            )
            index += 1


def write_pictures(folder: Path, count: int) -> Path:
    """Rows with a JPEG of 640 x 480 pixels, about 100 kB, each."""
    rng = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(count):
            noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            (folder / f"{index}.jpg").write_bytes(buffer.getvalue())
            turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"Noise {index}."}]
            file.write(json.dumps({"id": f"row-{index}", "image": f"{index}.jpg", "conversations": turns}) + "\n")
    return folder / "rows.jsonl"


def write_ids(work: Path, count: int) -> None:
    """Hashes as the first pass of a conversion leaves them, 1 % of them twice."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (count, 3), dtype=np.uint64)
    hashes[rng.integers(0, count, count // 100), 0] = hashes[rng.integers(0, count, count // 100), 0]
    hashes[:, 2] = np.arange(1, count + 1)
    for index, start in enumerate(range(0, count, 5_000)):
        np.save(work / f"ids-{index:05d}.npy", hashes[start : start + 5_000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[250, 2000], help="sizes of the files of text")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for megabytes in options.megabytes:
            path = folder / f"{megabytes}.jsonl"
            write_text(path, megabytes)
            for what, code in (("convert", CONVERT), ("check", CHECK)):
                rows, seconds, peak = run(code, path, folder / f"out-{megabytes}")
                show(f"{what} text of {megabytes:,} MB", rows, seconds, peak)
            path.unlink()
        (folder / "pictures").mkdir()
        rows_file = write_pictures(folder / "pictures", options.pictures)
        for what, code in (("convert", CONVERT), ("check", CHECK)):
            rows, seconds, peak = run(code, rows_file, folder / "out-pictures")
            show(f"{what} pictures", rows, seconds, peak)
        (folder / "ids").mkdir()
        write_ids(folder / "ids", options.ids)
        before, seconds, peak = run(REPEATED, folder / "ids")
        print(f"repeated ids among {options.ids:,}: {seconds:.0f} s, peak {peak:.0f} MB, of which {before:.0f} before")
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
