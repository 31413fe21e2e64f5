"""Work is never lost: what is stopped at random moments, and begun again, ends as what was left alone."""

import json
import os
import signal

import kill_worker
import pytest
from tqdm import tqdm
from workers import fork, run_worker


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the stops need fork")


def stopped(folder, stops: int, names: list[str], how: str = "signals") -> list[dict]:
    printed = run_worker(kill_worker, folder, stops, 0, how, *names, seconds=3600)
    print(printed)
    results = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert all(not result["different"] for result in results), results
    assert sum(result["stops"] for result in results) >= stops
    return results


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", kill_worker.VERBS)
def test_a_verb_that_is_stopped_ends_with_the_bytes_of_one_left_alone(tmp_path, verb):
    """20 times by SIGKILL and 20 times by SIGTERM: no folder and no process is left over."""
    stopped(tmp_path, 40, [verb])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", kill_worker.VERBS)
def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path, verb):
    stopped(tmp_path, 4, [verb], "disk")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["signals", "disk"])
def test_a_cheap_verb_is_stopped_twice(tmp_path, how):
    stopped(tmp_path, 2, ["data cambrian"], how)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stages_that_are_killed_end_with_the_same_weights(tmp_path):
    """All four, guided and not. After each of 20 kills the worker loads every checkpoint that is there."""
    results = stopped(tmp_path, 20, kill_worker.RUNS)
    assert {result["work"] for result in results if result["stops"]} == set(kill_worker.RUNS)


def test_a_start_that_is_killed_while_it_draws_holds_up_no_later_one(tmp_path):
    def draw(folder):
        list(tqdm(range(3)))

    def killed(folder):
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def started() -> None:
        kill_worker.share_no_lock()
        draw(tmp_path)  # tqdm makes its lock with the first bar
        ended = [
            os.waitpid(kill_worker.start(work, tmp_path, tmp_path / "output.txt"), 0)[1] for work in (killed, draw)
        ]
        assert ended == [signal.SIGKILL, 0]

    fork(started, seconds=60)
