"""Speed of the grounded scenes on one core: drawn rows (JPEG and mask encoding included) and told conversations.

python bench/scenes.py [--rows 1000] [--size 224] [--cutouts FOLDER]
"""

import argparse
import time
from collections.abc import Callable

from agevlm.data.scenes.build import text_corpus
from agevlm.data.scenes.builder import SceneArguments, SceneBuilder


_WARM_UP = 300  # rows in which the glyphs are rendered once


def rate(make: Callable[[int], object], first: int, count: int) -> float:
    """Calls of `make` per second of processor time, so that other jobs on the machine do not count."""
    start = time.process_time()
    for index in range(first, first + count):
        make(index)
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--cutouts", help="folder of cut-outs; icons without it")
    options = parser.parse_args()
    builder = SceneBuilder(SceneArguments(size=options.size, cutouts=options.cutouts))
    for name, make in (("captions", builder.caption_row), ("instructions", builder.instruction_row)):
        cold = rate(make, 0, _WARM_UP)
        warm = rate(make, _WARM_UP, options.rows)
        print(f"{name:12s} {options.size} px: {warm:7.0f} rows/s (first {_WARM_UP}: {cold:.0f} rows/s)")
    start = time.process_time()
    made = sum(1 for _ in text_corpus(10 * options.rows))
    print(f"text corpus        : {made / (time.process_time() - start):7.0f} conversations/s")


if __name__ == "__main__":
    main()
