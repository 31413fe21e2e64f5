"""The benchmarks by name, each under its protocols. A new benchmark is one more module in this list.

Those of text alone and own questions are asked by name: `all` means the published benchmarks of pictures.
"""

from collections import ChainMap

from . import cvbench, hallusionbench, ocrbench, own, pope, realworldqa, told
from .benchmark import Benchmark


BENCHMARKS: dict[str, dict[str, Benchmark]] = {
    module.PAPER.name: module.PROTOCOLS for module in (pope, cvbench, ocrbench, hallusionbench, realworldqa)
}
TEXT_ONLY: dict[str, dict[str, Benchmark]] = {told.PAPER.name: told.PROTOCOLS}
OWN: dict[str, dict[str, Benchmark]] = {own.PAPER.name: own.PROTOCOLS}
EVERY = ChainMap(OWN, TEXT_ONLY, BENCHMARKS)  # those of pictures come first
