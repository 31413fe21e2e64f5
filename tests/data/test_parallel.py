"""Processes end with the command that started them, however that ends, and leave no folder behind."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_their_command(tmp_path, number, status):
    out = tmp_path / "scenes"
    command = [sys.executable, "-m", "agevlm", "data", "scenes", str(out), "--captions", "50000", "--num-proc", "2"]
    # Whoever runs the tests in the background ignores SIGINT, and children inherit that.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds)
    try:
        partial = tmp_path / ".scenes.incomplete"
        wait_until(lambda: len(children(process.pid)) >= 3 and any(partial.rglob("*.parquet")))  # two and a tracker
        workers = children(process.pid)
        process.send_signal(number)
        assert process.wait(60) == status
        wait_until(lambda: not any(runs(worker) for worker in workers))
        assert not out.exists()
        if number != signal.SIGKILL:
            assert not partial.exists()
            assert "agevlm: interrupted" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        for worker in workers if "workers" in locals() else []:
            if runs(worker):
                os.kill(worker, signal.SIGKILL)


STEPS = """
import time
from functools import partial
from agevlm.cli import _interrupt
from agevlm.reproduction.reproduce import Step, execute
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    execute([Step(name, partial(time.sleep, 600)) for name in "ab"], 2, strict=False, tell=print)
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_steps_of_a_reproduction_end_with_it(tmp_path, number):
    """A step takes minutes; SIGTERM reaches the parent alone and must not wait for them."""
    script = tmp_path / "steps.py"
    script.write_text(STEPS, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    workers = []
    try:
        wait_until(lambda: len(children(process.pid)) >= 3)  # two and a tracker
        workers = children(process.pid)
        time.sleep(5)  # they have begun
        process.send_signal(number)
        process.wait(60)
        wait_until(lambda: not any(runs(worker) for worker in workers))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        for worker in workers:
            if runs(worker):
                os.kill(worker, signal.SIGKILL)


STEP = 'Step(name, partial(time.sleep, 600)) for name in "ab"'
FAILS = STEPS.replace(STEP, "Step(str(seconds), partial(time.sleep, seconds)) for seconds in (600, -1)")


@pytest.mark.slow
def test_a_step_that_fails_strictly_does_not_wait_for_the_others(tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(FAILS.replace("strict=False", "strict=True"), encoding="utf-8")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "sleep length must be non-negative" in ended.stderr
