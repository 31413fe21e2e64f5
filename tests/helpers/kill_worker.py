"""Runs work and stops it, again and again, at random moments; a process of its own, so that it can fork.

    python tests/helpers/kill_worker.py FOLDER STOPS SEED HOW WORK ...

WORK is a verb of `agevlm` (`VERBS`), which SIGKILL and SIGTERM stop in turn (HOW is `signals`), or a disk that takes
no file beyond some size (`disk`: the verb must say so in one line, and leave no process); or a stage with its variant
(`RUNS`), which SIGKILL stops. Every start is a fork of this process, whose imports are done: most of its life is work
and saving. `export` traces for a minute before it saves for a second: the run that is left alone traces, the others
save what this process has traced.

Prints one JSON line for each finished run: the work, the number of stops, what they left, and `different`, the files
that are not those of a run that was left alone.
"""

import dataclasses
import faulthandler
import json
import os
import random
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from training_worker import make_rows, quick
from transformers import TrainerState
from workers import same_weights

from agevlm import cli
from agevlm.data.scenes.build import build_scenes
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.reproduction import prepare
from agevlm.reproduction.matrix import SIZES
from agevlm.serving import exported
from agevlm.training.checkpoints import STAGING
from agevlm.training.lineage import read_lineage
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import STAGES
from builders import picture, save_tiny, tiny_model, tiny_processor


# All stages, and those that are guided without guidance as well.
RUNS = [f"{stage} agevlm-lm" for stage in STAGES] + [f"{stage} ca-baseline" for stage in list(STAGES)[2:]]
VERBS = {
    "data scenes": "--captions 24 --instructions 12 --test 4 --size 96 --workers 2",
    "data cambrian": "{inputs}/rows.jsonl --rows-per-shard 8 --workers 2",
    "ground": "{inputs}/scenes/captions --backend exact --masks {inputs}/scenes/masks/captions.parquet --batch-size 1",
    "eval": "{inputs}/model --scenes {inputs}/scenes --benchmarks pope hallusionbench --max-new-tokens 3 "
    "--batch-size 2",
    "analyze similarity": "{inputs}/model {inputs}/scenes --limit 16 --batch-size 1",
    "export": "{inputs}/model",
    "train": "stage3_ground --size tiny --data {inputs}/scenes --init-from {inputs}/model --max-steps 6 "
    "--save-steps 2 --per-device-train-batch-size 2 --gradient-accumulation-steps 1",
    "reproduce": "--parts {parts} --only agevlm --strict --jobs 1",
}
OUTPUT = "out"
PARTS = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny-parts"
STOPS_PER_RUN = 4
LONGEST = 800  # seconds of a start; one that hangs says where, and fails
# What a clock says, and what is said of the last process alone
CLOCK = re.compile(
    rb'"(?:seconds|data_wait|mfu|memory_gib|\w+_per_second|train_runtime|train_loss|scenes and parts|'
    rb'training and measuring)": [^,\n}]+|'
    rb"(?:\d+ min )?\d+ s in this call|<dd>(?:\d+ min )?\d+ s</dd>"
)


# ---- Work ----


def inputs(folder: Path) -> None:
    """What the verbs read: a model, scenes, published rows."""
    save_tiny(folder / "model")
    build_scenes(folder / "scenes", captions=24, instructions=12, test=4, size=96, progress=False)
    (folder / "pictures").mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(40):
            picture(seed=number).save(folder / "pictures" / f"{number}.png")
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
            row = {"id": str(number), "image": f"pictures/{number}.png", "conversations": turns}
            file.write(json.dumps(row) + "\n")


def run_verb(verb: str, inputs: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    if verb == "reproduce":
        SIZES["tiny-scratch"] = dataclasses.replace(
            SIZES["tiny-scratch"], captions=8, instructions=8, questions=4, pairs=4, oblong=2, turns=1, image_size=96
        )
        prepare.CURVE_QUESTIONS = 8
    flag = "--output-dir" if verb == "train" else "--output"
    vars(sys.modules["__main__"]).pop("__file__", None)  # workers of the verb need not import this module
    words = [word.format(inputs=inputs, parts=PARTS) for word in VERBS[verb].split()]
    sys.argv = ["agevlm", *verb.split(), *words, flag, OUTPUT]
    cli.main()


def trace_once(inputs: Path, folder: Path) -> None:
    """Exports here, and lets every later `export`, in forks too, find the graphs that this one has traced."""
    trace, made = exported.export, []

    def export(*args, **options):
        made[:] = made or [trace(*args, **options)]
        return made[0]

    exported.export = export
    run_verb("export", inputs, folder)


def run(stage: str, variant: str, folder: Path) -> None:
    recipe = quick(STAGES[stage](size="tiny", variant=variant), save_steps=2, logging_steps=1)
    rows = make_rows("gigtgiiggitgigti")
    run_stage(recipe, folder / OUTPUT, data=rows, model=tiny_model(), processor=tiny_processor())


# ---- What a stop leaves ----


def check(folder: Path) -> str:
    """Fails if anything partial of a stage looks complete; says what the kill has left."""
    folder = folder / OUTPUT
    if not folder.exists():
        return "before the first file"
    for checkpoint in folder.glob("checkpoint-*"):
        AgeVlmForConditionalGeneration.from_pretrained(checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        assert state.global_step == int(checkpoint.name.removeprefix("checkpoint-")), checkpoint
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
    lineage = read_lineage(folder)
    if lineage is not None and lineage["status"] == "finished":
        AgeVlmForConditionalGeneration.from_pretrained(folder)
        return "after the end"
    if (folder / STAGING).exists():
        return "while saving"
    return "between saves"


def look(folder: Path) -> str:
    return "files" if any(path.is_file() for path in folder.rglob("*")) else "before the first file"


def different(one: Path, other: Path) -> list[str]:
    """Names of the files, hidden ones too, that only one folder has, or that differ in more than time."""
    first, second = (
        {str(path.relative_to(folder)): CLOCK.sub(b"", path.read_bytes()) for path in folder.rglob("*")
         if path.is_file()}
        for folder in (one, other)
    )  # fmt: skip
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def other_weights(one: Path, other: Path) -> list[str]:
    return [] if same_weights(one / OUTPUT, other / OUTPUT) else ["model.safetensors"]


# ---- Starts and stops ----


def share_no_lock() -> None:
    """All forks of a process share tqdm's own lock: a start that is killed while it holds it would block all later
    ones. The verbs of a user share none: each is a process of its own."""
    tqdm.set_lock(threading.RLock())


def start(work: Callable[[Path], None], folder: Path, output: Path, most: int | None = None) -> int:
    """A fork, with a session of its own, that does the work; returns its process id. `most`: bytes of a file."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        work(folder)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def stop_after(child: int, seconds: float, number: int) -> None:
    """Sends the signal after a while, unless the process has ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)
    os.kill(child, number)


def session(leader: int) -> list[str]:
    """The processes that a start has left behind."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.info['cmdline']}")
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def wait_for_nobody(leader: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while left := session(leader):
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.1)


def refused(work: Callable[[Path], None], folder: Path, most: int) -> None:
    """One start on a disk that is too small: status 2, one line of ours, no process."""
    said = folder.with_suffix(".txt")
    child = start(work, folder, said, most)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = said.read_text(errors="replace")
    said.unlink()
    wait_for_nobody(child)
    assert status == 2 and "Traceback" not in text, f"{most} bytes: {status}: {text[-3000:]}"
    (line,) = (line for line in re.split("[\r\n]", text) if line.startswith("agevlm: "))
    assert "File too large" in line or "cannot be written" in line, line


def main(folder: Path, stops: int, seed: int, how: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    share_no_lock()
    rng = random.Random(seed)
    output = folder / "output.txt"
    if VERBS.keys() & set(names):
        inputs(folder / "inputs")
    total = number = 0
    lengths: dict[str, float] = {}
    unhurt = list(names)  # have ended before their stop came
    while total < stops or unhurt:
        name = unhurt[0] if unhurt else names[number % len(names)]
        is_verb = name in VERBS
        work = partial(run_verb, name, folder / "inputs") if is_verb else partial(run, *name.split())
        leaves, compare = (look, different) if is_verb else (check, other_weights)
        alone = folder / f"alone-{name}"
        if not alone.exists():
            begun = time.monotonic()
            assert os.waitpid(start(work, alone, output), 0)[1] == 0, output.read_text()[-3000:]
            lengths[name] = time.monotonic() - begun
            if name == "export":
                trace_once(folder / "inputs", folder / "traced")
        stopped = folder / f"stopped-{number}"
        left: Counter[str] = Counter()
        if how == "disk":
            largest = max(path.stat().st_size for path in alone.rglob("*"))
            for _ in range(min(stops - total, STOPS_PER_RUN)):
                refused(work, stopped, rng.randrange(largest // 4, largest))
                left[leaves(stopped)] += 1
                total += 1
        while True:
            begun, child = time.monotonic(), start(work, stopped, output)
            # At least one stop for each run and not many more, then until there have been enough.
            if how == "signals" and (not left or (total < stops and left.total() < STOPS_PER_RUN)):
                kind = signal.SIGTERM if is_verb and total % 2 else signal.SIGKILL
                stop_after(child, rng.uniform(0.05, 1.0) * lengths[name], kind)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 128 + signal.SIGTERM:
                wait_for_nobody(child)
                left[leaves(stopped)] += 1
                total += 1
                continue
            assert status == 0, output.read_text()[-3000:]
            if not left:  # a whole run whose stop came too late: the machine may have been busy before
                lengths[name] = min(lengths[name], time.monotonic() - begun)
            break
        number += 1
        if left and name in unhurt:
            unhurt.remove(name)
        result = {"work": name, "stops": left.total(), "left": left, "different": compare(alone, stopped)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
