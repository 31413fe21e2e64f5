"""Runs stages and kills them, again and again, at random moments; a process of its own, so that it can fork.

    python tests/helpers/kill_worker.py FOLDER KILLS SEED

Every start is a fork of this process, whose imports are done: most of its life is training and saving. Prints one JSON
line for each finished run: stage, variant, kills, where the kills fell, and whether its weights are those of a run
that was left alone.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from training_worker import make_rows, quick
from transformers import TrainerState
from workers import same_weights

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.training.checkpoints import STAGING
from agevlm.training.lineage import read_lineage
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import STAGES
from builders import tiny_model, tiny_processor


# All stages, and those that are guided without guidance as well.
RUNS = [(stage, "agevlm-lm") for stage in STAGES] + [(stage, "ca-baseline") for stage in list(STAGES)[2:]]
KILLS_PER_RUN = 4


def run(stage: str, variant: str, folder: Path) -> None:
    recipe = quick(STAGES[stage](size="tiny", variant=variant), save_steps=2, logging_steps=1)
    rows = make_rows("gigtgiiggitgigti")
    run_stage(recipe, folder, data=rows, model=tiny_model(), processor=tiny_processor())


def start(stage: str, variant: str, folder: Path) -> int:
    """A fork that runs the stage; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(folder.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        run(stage, variant, folder)
        status = 0
    finally:
        os._exit(status)


def kill_after(child: int, seconds: float) -> None:
    """Kills the process after a while, unless it has ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)


def check(folder: Path) -> str:
    """Fails if anything partial looks complete; says what the kill has left."""
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


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    total = number = 0
    lengths: dict[tuple[str, str], float] = {}
    unhurt = list(RUNS)  # have ended before their kill came
    while total < kills or unhurt:
        stage, variant = unhurt[0] if unhurt else RUNS[number % len(RUNS)]
        alone = folder / f"alone-{stage}-{variant}"
        if not alone.exists():
            begun = time.monotonic()
            assert os.waitpid(start(stage, variant, alone), 0)[1] == 0, (folder / "output.txt").read_text()[-3000:]
            lengths[stage, variant] = time.monotonic() - begun
        killed = folder / f"killed-{number}"
        left: Counter[str] = Counter()
        while check(killed) != "after the end":
            begun, child = time.monotonic(), start(stage, variant, killed)
            # At least one kill for each run and not many more, then until there have been enough.
            if not left or (total < kills and left.total() < KILLS_PER_RUN):
                kill_after(child, rng.uniform(0.05, 1.0) * lengths[stage, variant])
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                left[check(killed)] += 1
                total += 1
            else:
                assert status == 0, (folder / "output.txt").read_text()[-3000:]
                # A machine that was busy before may be idle now, and most kills would come too late.
                lengths[stage, variant] = min(lengths[stage, variant], time.monotonic() - begun)
        same = same_weights(killed, alone)
        number += 1
        if left and (stage, variant) in unhurt:
            unhurt.remove((stage, variant))
        result = {"stage": stage, "variant": variant, "kills": sum(left.values()), "left": left, "same": same}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
