"""Work is never lost: stages that are killed at random moments end with the weights of a run that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kill_worker
import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need fork")
def test_twenty_random_kills_change_nothing(tmp_path):
    """Of all four stages, guided and not. After each kill the worker loads every checkpoint that is there."""
    worker = Path(kill_worker.__file__)
    run = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), "20", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    print(run.stdout)
    assert all(result["same"] for result in results)
    assert sum(result["kills"] for result in results) >= 20
    stages = {(result["stage"], result["variant"]) for result in results if result["kills"]}
    assert stages == set(kill_worker.RUNS)
