"""The benchmarks by name, each under its protocols. A new benchmark is one more module in this list.

Those of text alone are asked by name: `all` means the benchmarks of pictures.
"""

from collections import ChainMap

from . import cvbench, hallusionbench, ocrbench, pope, realworldqa, told
from .benchmark import Benchmark


BENCHMARKS: dict[str, dict[str, Benchmark]] = {
    module.PAPER.name: module.PROTOCOLS for module in (pope, cvbench, ocrbench, hallusionbench, realworldqa)
}
TEXT_ONLY: dict[str, dict[str, Benchmark]] = {told.PAPER.name: told.PROTOCOLS}
EVERY = ChainMap(TEXT_ONLY, BENCHMARKS)  # those of pictures come first
