"""Stage 1 with stored features beside stage 1 that runs the tower: steps per second, and where the time goes.

    python bench/stored_features.py [--size tiny] [--steps 60] [--rounds 3] [--profile]

The committed tiny parts on captions of scenes, as `agevlm reproduce` trains them. Rounds of both alternate in one
process; the steps of a round are timed behind the first ten. Times are processor time: set OMP_NUM_THREADS=1.
`--profile` prints a profile of the steps that read.
"""

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback

from agevlm import TINY_PARTS
from agevlm.data.scenes.build import build_scenes, load_rows
from agevlm.reproduction.matrix import SIZES, Start
from agevlm.reproduction.prepare import save_start
from agevlm.reproduction.reproduce import quiet
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align


WARM_UP = 10


class Clock(TrainerCallback):
    """Seconds of the steps behind the first ones."""

    def __init__(self, profile: cProfile.Profile | None):
        self.profile, self.started, self.seconds = profile, 0.0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.started = time.process_time()
            if self.profile is not None:
                self.profile.enable()
        if state.global_step == state.max_steps:
            if self.profile is not None:
                self.profile.disable()
            self.seconds = time.process_time() - self.started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "clutter-able"], default="tiny", help="of `agevlm reproduce`")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    quiet()
    size = SIZES[arguments.size]
    steps = arguments.steps + WARM_UP
    recipe = stage1_align.recipe(size="tiny").override(
        max_steps=steps,
        save_strategy="no",
        disable_tqdm=True,
        peak_tflops=1.0,  # not measured among the steps
    )
    rates: dict[str, list[float]] = {"runs the tower": [], "reads features": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        scenes = build_scenes(
            folder / "scenes", captions=min(size.captions, steps * recipe.global_batch_size), instructions=20, test=20,
            size=size.image_size, min_objects=size.min_objects, max_objects=size.max_objects,
            names=size.names, colors=size.colors, progress=False,
        )  # fmt: skip
        save_start(TINY_PARTS, folder / "start", 0, size, Start())
        rows = load_rows(scenes, "captions", mask_fraction=0.0)
        profile = cProfile.Profile(time.process_time) if arguments.profile else None
        for round_ in range(arguments.rounds):
            for name, of in rates.items():
                reads = name == "reads features"
                clock = Clock(profile if reads else None)
                result = run_stage(
                    recipe, folder / f"{name} {round_}", data=rows, init_from=folder / "start", callbacks=[clock],
                    stored_features=folder / "features" if reads else None, console=Console(quiet=True, markup=False),
                )  # fmt: skip
                of.append(arguments.steps / clock.seconds)
    print("| stage 1 | " + " | ".join(f"round {n + 1}" for n in range(arguments.rounds)) + " | median steps/s |")
    print("|---" * (arguments.rounds + 2) + "|")
    for name, of in rates.items():
        print(f"| {name} | " + " | ".join(f"{rate:.2f}" for rate in of) + f" | {statistics.median(of):.2f} |")
    ratios = [read / computed for computed, read in zip(*rates.values(), strict=True)]
    ratio = statistics.median(ratios)
    tokens = max(entry.get("num_tokens", 0) for entry in result.log_history) / recipe.global_batch_size / steps
    print(f"\nratio {ratio:.2f} (median of the rounds): {1 - 1 / ratio:.0%} of a step that runs the tower is pictures")
    print(f"{tokens:.0f} tokens a row; {torch.get_num_threads()} thread(s)")
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
