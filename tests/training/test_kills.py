"""Work is never lost: stages that are killed at random moments end with the weights of a run that was left alone."""

import json
import os

import kill_worker
import pytest
from workers import run_worker


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need fork")
def test_twenty_random_kills_change_nothing(tmp_path):
    """Of all four stages, guided and not. After each kill the worker loads every checkpoint that is there."""
    printed = run_worker(kill_worker, tmp_path, 20, 0, seconds=1800)
    results = [json.loads(line) for line in printed.splitlines()]
    print(printed)
    assert all(result["same"] for result in results)
    assert sum(result["kills"] for result in results) >= 20
    stages = {(result["stage"], result["variant"]) for result in results if result["kills"]}
    assert stages == set(kill_worker.RUNS)
