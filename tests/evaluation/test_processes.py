"""Several processes, killed and started again in another number: the metrics of one that ran through."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from agevlm.evaluation.cli import evaluate as main
from builders import save_tiny, tiny_scenes


ROWS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, scenes, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "model")
    tiny_scenes(folder / "scenes", test=ROWS)
    main(arguments(folder, "one", batch_size=8))
    return folder


def arguments(folder, output, batch_size):
    return [
        str(folder / "model"), "--scenes", str(folder / "scenes"), "--output", str(folder / output),
        "--benchmarks", "pope", "hallusionbench", "--max-new-tokens", "3", "--batch-size", str(batch_size),
    ]  # fmt: skip


def result(folder, output):
    """Everything that must not depend on batch, processes or interruptions."""
    metrics = json.loads((folder / output / "model" / "metrics.json").read_text(encoding="utf-8"))
    files = {
        str(path.relative_to(folder / output)): path.read_bytes()
        for path in sorted((folder / output).rglob("*")) if path.is_file() and path.name != "metrics.json"
    }  # fmt: skip
    # attention is measured in batches of other widths, whose float32 sums differ in the last digits
    grounding = metrics.pop("grounding")
    for benchmark in metrics["benchmarks"].values():
        benchmark.pop("grounding")
    return {**metrics, "seconds": 0}, {n: c for n, c in files.items() if "predictions" in n}, grounding


def check_equal(place, output):
    metrics, files, grounding = result(place, output)
    expected_metrics, expected_files, expected = result(place, "one")
    assert metrics == expected_metrics
    assert files == expected_files, "one file of predictions, in the order of the rows"
    assert grounding["n"] == expected["n"] > 0
    assert grounding["in_mask_mass"]["per_layer"] == pytest.approx(expected["in_mask_mass"]["per_layer"], rel=1e-4)
    assert grounding["pointing_accuracy"] == expected["pointing_accuracy"]


def launch(place, output, processes, batch_size=1):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "-m", "agevlm", "eval", *arguments(place, output, batch_size)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_the_same(place):
    process = launch(place, "two", 2)
    folder = place / "two" / "model" / "pope"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        written = sum(path.read_bytes().count(b"\n") for path in folder.glob("predictions*.jsonl"))
        if written >= 2:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stdout.read()
    assert not (place / "two" / "model" / "metrics.json").exists()
    again = launch(place, "two", 2)
    output, _ = again.communicate(timeout=250)
    assert again.returncode == 0, output
    check_equal(place, "two")


def test_any_batch_size_gives_the_same(place):
    main(arguments(place, "batch-3", 3))
    check_equal(place, "batch-3")


def test_what_two_processes_left_one_takes_over(place):
    """The lines of one process's predictions, dealt to two files as two processes would have left them."""
    main(arguments(place, "taken", 4))
    folder = place / "taken" / "model"
    (folder / "metrics.json").unlink()
    path = folder / "pope" / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[0:4:2]), encoding="utf-8")
    (folder / "pope" / "predictions.1.jsonl").write_text(lines[1] + lines[3][:20], encoding="utf-8")
    main(arguments(place, "taken", 4))
    check_equal(place, "taken")
