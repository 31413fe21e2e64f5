"""Bookkeeping of `agevlm ground`: rows a second on one core, and memory while their number grows.

    python bench/grounding.py --rows 100000

The models are left out: masks come from a file that is there already, so that what is measured is reading rows,
checking sizes, measuring and packing masks, the journal and the output. Pictures and masks are 640 x 480.
Time is this process's processor time, which other work on the machine changes little. Memory is what the process holds
for itself (RssAnon), without the files that are mapped into it.
"""

import argparse
import io
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from agevlm.data.rows import MASK_FEATURES, ROW_FEATURES
from agevlm.data.tables import load_table
from agevlm.grounding.backends import Exact
from agevlm.grounding.masks import to_png
from agevlm.grounding.runner import ground
from agevlm.processing import AgeVlmImageProcessorPil


SIZE = (640, 480)
DIFFERENT = 64  # pictures and masks; the rows repeat them


def anonymous_memory() -> int:
    """Bytes that this process holds for itself (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


class Watch(threading.Thread):
    """Memory over the run, a few times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[int] = []
        self.running = True

    def run(self) -> None:
        while self.running:
            self.seen.append(anonymous_memory())
            time.sleep(0.2)


def make_files(folder: Path, count: int) -> tuple[Path, Path]:
    """Rows and exact masks as Parquet: photographs would be larger, their headers are not."""
    generator = np.random.default_rng(0)
    pictures, masks = [], []
    for _ in range(DIFFERENT):
        buffer = io.BytesIO()
        Image.new("RGB", SIZE, tuple(generator.integers(0, 256, 3).tolist())).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
        mask = Image.new("1", SIZE)
        pen = ImageDraw.Draw(mask)
        for _ in range(2):
            x, y, width, height = generator.integers(20, 300, 4).tolist()
            pen.ellipse((x, y, x + width, y + height), fill=1)
        masks.append(to_png(np.array(mask))["bytes"])
    paths = folder / "rows.parquet", folder / "masks.parquet"
    with (
        pq.ParquetWriter(paths[0], ROW_FEATURES.arrow_schema) as rows_file,
        pq.ParquetWriter(paths[1], MASK_FEATURES.arrow_schema) as masks_file,
    ):
        for start in range(0, count, 1000):
            numbers = range(start, min(start + 1000, count))
            rows = [
                {
                    "id": f"row-{number:07d}",
                    "images": [{"bytes": pictures[number % DIFFERENT], "path": None}],
                    "messages": [
                        {"role": "user", "content": "<|image|>Describe the image."},
                        {"role": "assistant", "content": f"Something round, number {number}."},
                    ],
                }
                for number in numbers
            ]
            found = [
                {"id": f"row-{number:07d}", "mask": {"bytes": masks[number % DIFFERENT], "path": None}}
                for number in numbers
            ]
            rows_file.write_table(pa.Table.from_pylist(rows, schema=ROW_FEATURES.arrow_schema))
            masks_file.write_table(pa.Table.from_pylist(found, schema=MASK_FEATURES.arrow_schema))
    return paths


def measure(folder: Path, count: int) -> dict[str, float]:
    """One run of `count` rows: rows per processor second, and memory at its start and at its highest, in MB."""
    folder.mkdir()
    rows, masks = map(load_table, map(str, make_files(folder, count)))
    pa.default_memory_pool().release_unused()
    watch, before, started = Watch(), anonymous_memory(), time.process_time()
    watch.start()
    summary = ground(
        rows,
        folder / "out",
        lambda: Exact.of(masks),
        backend_name="exact",
        grid=AgeVlmImageProcessorPil(),
        batch_size=64,
        progress=False,
    )
    seconds = time.process_time() - started
    watch.running = False
    watch.join()
    assert summary is not None and summary["kept"] == count
    return {
        "rows": count,
        "rows_per_second": count / seconds,
        "start_mb": before / 1e6,
        "growth_mb": (max(watch.seen) - before) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The small run first: it pays for imports and first allocations, and the large one is compared to it.
        for number, count in enumerate((options.rows // 20, options.rows)):
            print(
                json.dumps({k: round(v, 1) for k, v in measure(Path(folder) / str(number), count).items()}), flush=True
            )


if __name__ == "__main__":
    main()
