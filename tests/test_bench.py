"""Every script in `bench/` runs to its end at its smallest size and prints figures.

A bench is run by hand, months apart. Without this test nobody sees that a function it calls has changed.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SMALLEST = {
    "data.py": [["--megabytes", "1", "--pictures", "10", "--ids", "10000"]],
    "evaluation.py": [["--rows", "4", "--batch-size", "2", "--rounds", "1"]],
    "export.py": [["--questions", "2", "--rounds", "1", "--steps", "2"]],
    "grounding.py": [["--rows", "200"]],
    "guidance.py": [
        ["--tokens", "32", "--batch", "1", "--rounds", "1"],
        ["--tokens", "32", "--batch", "1", "--rounds", "1", "--layers", "1", "--step"],
    ],
    "image_processing.py": [["--size", "64", "--batch", "1", "--rounds", "1"]],
    "inference.py": [["--size", "small", "--tokens", "8", "--steps", "2", "--rounds", "1"]],
    "input_pipeline.py": [
        ["throughput", "--rows", "64", "--rounds", "1", "--workers", "0"],
        ["memory", "--rows", "1000"],
        ["resume", "--rows", "10000"],
    ],
    "scenes.py": [["--rows", "8", "--size", "64"]],
    "stored_features.py": [["--steps", "1", "--rounds", "1"]],
}


def test_each_script_is_listed():
    assert sorted(SMALLEST) == sorted(path.name for path in (ROOT / "bench").glob("*.py"))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # --step builds layers of a 1B model
@pytest.mark.parametrize(
    ("script", "arguments"),
    [(script, arguments) for script, calls in SMALLEST.items() for arguments in calls],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:30],
)
def test_a_bench_prints_figures(script, arguments):
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"\d", done.stdout)
