"""Several processes: each takes its share, one writes the output, and one process may finish what two began."""

import os
import subprocess
import time

import psutil
import pytest
from workers import TORCHRUN

from agevlm.grounding import cli as ground
from agevlm.grounding.journal import Journals
from agevlm.grounding.output import JOURNAL_FEATURES, read_masks


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_one_may_finish_for_two(tmp_path, write_files):
    count = 600
    boxes = [(number % 20, 3, 25, 15) for number in range(count)]
    rows, masks = write_files([f"number {number}" for number in range(count)], [(30, 20)] * count, boxes)

    def command(out, *more):
        return [rows, str(tmp_path / out), "--backend", "exact", "--masks", masks, *more]

    def launch(out, *more):
        return [*TORCHRUN, "-m", "agevlm", "ground", *command(out, *more)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ground.ground(command("one"))
    subprocess.run(launch("two"), check=True, env=environment, timeout=280)
    assert len(list((tmp_path / "two" / "journal").glob("*.arrows"))) == 2
    assert read_masks(tmp_path / "two").to_list() == read_masks(tmp_path / "one").to_list()

    schema = JOURNAL_FEATURES.arrow_schema
    begun = subprocess.Popen(launch("cut", "--batch-size", "1"), env=environment)
    journal = tmp_path / "cut" / "journal"
    while begun.poll() is None and (not journal.exists() or len(Journals(journal, schema).indices) < 5):
        time.sleep(0.01)
    for process in [psutil.Process(begun.pid), *psutil.Process(begun.pid).children(recursive=True)]:
        process.kill()
    begun.wait()
    assert 0 < len(Journals(journal, schema).indices) < 600
    ground.ground(command("cut", "--batch-size", "64"))
    assert read_masks(tmp_path / "cut").to_list() == read_masks(tmp_path / "one").to_list()
