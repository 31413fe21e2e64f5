"""The benchmarks by name, each under its protocols. A new benchmark is one more module in this list."""

from . import cvbench, hallusionbench, ocrbench, pope, realworldqa
from .benchmark import Benchmark


BENCHMARKS: dict[str, dict[str, Benchmark]] = {
    module.PAPER.name: module.PROTOCOLS for module in (pope, cvbench, ocrbench, hallusionbench, realworldqa)
}
