"""`agevlm quickstart`: the whole method on the embedded data, from composing pictures to a report (sections 3 and 4).

    scenes -> pretrained parts -> stages 1, 2 -> stage 3 (guided, unguided) -> stage 4 (variants) -> evaluation, report

All variants see the same rows in the same order for the same number of steps. Stages that are one and the same
computation for several variants (1 and 2 for all, 3 for the two guided ones) run once and are shared. Everything
resumes: the same command again goes on where it was stopped.
"""

import argparse
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from agevlm.analysis.attention import write_examples
from agevlm.conversion.assemble import assemble, spread_cross_attention_layers
from agevlm.conversion.twin import concatenating_twin
from agevlm.data.scenes.build import build_scenes, load_benchmark
from agevlm.evaluation import cvbench, pope
from agevlm.evaluation.run import evaluate_scenes, stored_fingerprint
from agevlm.models import load
from agevlm.reproduction.matrix import PAPER_ROWS, Row, Run, Start, chain, cross_layers, unique
from agevlm.reproduction.report import write_report
from agevlm.reproduction.results import Example, Stage, Variant
from agevlm.reproduction.results import Run as SeedRun
from agevlm.store import new_folder
from agevlm.training.lineage import git_commit, library_versions
from agevlm.training.parts import COLOURS, NAMES, load_parts, make_small
from agevlm.training.run_stage import run_stage
from agevlm.training.stages.recipe import StageRecipe


# In the order in which the report shows them: without guidance first.
VARIANTS = tuple(row.name for row in PAPER_ROWS)
TITLES = {row.name: row.title for row in PAPER_ROWS}
SPLIT = "composition"
BENCHMARKS = (pope.PAPER.name, cvbench.PAPER.name)
MAX_NEW_TOKENS = 32
TINY_PARTS = Path(__file__).resolve().parents[3] / "checkpoints" / "tiny-parts"


@dataclass(frozen=True)
class Size:
    """Training rows of each part, questions of an instruction row (`turns`) and of each benchmark, what is in the
    pictures (None: everything there is), and where the cross blocks sit (None: every fourth layer)."""

    captions: int
    instructions: int
    turns: int
    questions: int
    max_objects: int
    names: tuple[str, ...] | None = None
    colours: tuple[str, ...] | None = None
    cross_attention_layers: tuple[int, ...] | None = None


SIZES = {
    "tiny": Size(
        captions=4_000,
        instructions=4_000,
        turns=4,
        questions=600,
        max_objects=3,
        names=NAMES,
        colours=COLOURS,
        cross_attention_layers=(1, 4),
    ),
    "small": Size(captions=16_000, instructions=16_000, turns=4, questions=800, max_objects=4),
}


def plan(size: str, seed: int) -> list[Run]:
    """All stage runs of one seed, parents before children."""
    return unique(chain(row, size, seed, _folder) for row in PAPER_ROWS)


def _folder(row: Row, stage: int, address: str) -> str:
    if stage == 3:
        return "stage3-guided" if 3 in row.guided else "stage3-unguided"
    return f"stage4-{row.name}" if stage == 4 else f"stage{stage}"


def path_of(variant: str, runs: Sequence[Run]) -> list[Run]:
    """The stage runs that lead to a variant, first stage first."""
    by_name = {run.name: run for run in runs}
    path = [by_name[f"stage4-{variant}"]]
    while path[0].parent is not None:
        path.insert(0, by_name[path[0].parent])
    return path


def steps_of(recipe: StageRecipe, size: Size) -> int:
    """Optimizer steps of a stage."""
    rows = getattr(size, recipe.data)
    return math.ceil(rows / recipe.global_batch_size) * int(recipe.training["num_train_epochs"])


def draw_scenes(folder: Path, size: Size, cutouts: Path | None) -> Path:
    """The data set of a size; at once where it is there."""
    return build_scenes(
        folder,
        captions=size.captions,
        instructions=size.instructions,
        turns=size.turns,
        test=size.questions,
        max_objects=size.max_objects,
        names=size.names,
        colours=size.colours,
        cutouts=cutouts,
        num_proc=min(2, os.cpu_count() or 1),
    )


def prepare_parts(size: str, parts: Path | None, output: Path, cutouts: Path | None) -> Path:
    """The folder of the pretrained parts: given, committed (tiny), or made now (small)."""
    if parts is not None:
        return parts
    if size == "tiny":
        return TINY_PARTS
    folder = output / "parts"
    if not folder.exists():
        assert cutouts is not None, "`main` asks for them"
        make_small(folder, output / "parts-work", cutouts, scenes=40_000, seed=1000)
    return folder


def save_start(
    parts: Path, folder: Path, seed: int, cross_attention_layers: Sequence[int] | None, start: Start
) -> None:
    """The model that stage 1 starts from: the pretrained parts, and projector and cross blocks drawn from `seed`."""
    if (folder / "config.json").exists():
        return
    model: Any
    processor: Any
    language_model, vision_tower, processor = load_parts(parts)
    depth = language_model.config.num_hidden_layers
    default = cross_attention_layers or spread_cross_attention_layers(depth)
    set_seed(seed)
    layers = cross_layers(start.layers, default, depth)
    model = assemble(language_model, vision_tower, processor.image_token_id, layers)
    if start.twin != "no":
        model, processor = concatenating_twin(model, processor, equal_size=start.twin == "equal")
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


class StepProgress(TrainerCallback):
    """Moves one bar over the optimizer steps of all stages."""

    def __init__(self, progress: Progress, task: Any, done_before: int):
        self.progress, self.task, self.done_before = progress, task, done_before

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=self.done_before + state.global_step)


def train(
    runs: Sequence[Run], folder: Path, scenes: Path, size: Size, progress: Progress, task: Any, done: int
) -> int:
    """All stage runs of one seed; `done` steps came before. Returns the steps done after."""
    for run in runs:
        progress.update(task, description=f"{folder.name}: {run.name}")
        run_stage(
            run.recipe,
            folder / run.name,
            data=scenes,
            init_from=folder / run.origin,
            callbacks=[StepProgress(progress, task, done)],
            console=Console(quiet=True),
        )
        done += steps_of(run.recipe, size)
        progress.update(task, completed=done)
    return done


def trained_stage(recipe: StageRecipe, folder: Path) -> Stage:
    """A finished stage run as the report wants it."""
    log = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
    return {"name": recipe.name, "log": log, "guidance_weight": recipe.training["guidance_weight"]}


def variant_results(name: str, plans: dict[int, list[Run]], output: Path, scenes: Path) -> Variant:
    """Evaluation and training log of one variant over all seeds, as the report wants them."""
    runs: list[SeedRun] = []
    for seed, stage_runs in plans.items():
        folder = output / f"seed-{seed}"
        path = path_of(name, stage_runs)
        checkpoint = str(folder / path[-1].name)
        model, processor = load(checkpoint, ours=True)
        evaluation = evaluate_scenes(
            model,
            processor,
            scenes,
            SPLIT,
            folder / "evaluation" / name,
            benchmarks=BENCHMARKS,
            name=TITLES[name],
            weights=stored_fingerprint(checkpoint),
            batch_size=50,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        stages = [trained_stage(run.recipe, folder / run.name) for run in path]
        runs.append({"seed": seed, "evaluations": {SPLIT: evaluation}, "stages": stages})
    return {"name": name, "title": TITLES[name], "runs": runs}


def draw_examples(checkpoints: Mapping[str, Path], scenes: Path, output: Path, count: int) -> list[Example]:
    """The first `count` presence questions with something to look at, not selected, drawn for every model.

    Args:
        checkpoints: title -> folder of a model. Of a concatenating one the map is that of its first self-attention
            layer, as in the paper.
    """
    rows = load_benchmark(scenes, SPLIT, pope.PAPER.name)
    marked = [index for index, mask in enumerate(rows["mask"]) if mask is not None][:count]
    models = {title: load(str(folder)) for title, folder in checkpoints.items()}
    return write_examples(
        models,
        [rows[index] for index in marked],
        output,
        prompt=pope.PAPER.prompt,
        correct=lambda row, answer: pope.PAPER.is_correct(row, pope.PAPER.parse(row, answer)),
    )


def settings(size: str, seeds: Sequence[int], plans: dict[int, list[Run]]) -> dict[str, Any]:
    """What the report says about how the numbers came about."""
    told: dict[str, Any] = {"size": size, "seeds": ", ".join(map(str, seeds))}
    for run in path_of("agevlm-lm", next(iter(plans.values()))):
        recipe, steps = run.recipe, steps_of(run.recipe, SIZES[size])
        told[recipe.name] = (
            f"{getattr(SIZES[size], recipe.data):,} {recipe.data}, {steps} steps of {recipe.global_batch_size}, "
            f"learning rate {recipe.training['learning_rate']:g}, masks on {100 * recipe.mask_fraction:g} %"
        )
    told["shared work"] = "stages 1 and 2 ran once for all variants, guided stage 3 once for the two guided ones"
    return told


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm quickstart`, with the arguments of `cli.py`."""
    if args.size == "small" and args.cutouts is None:
        raise ValueError(
            "The size `small` is made of real cut-out pictures: agevlm data cutouts --output cutouts, then "
            "--cutouts cutouts."
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, size, started = Console(), SIZES[args.size], time.monotonic()
    console.rule("Data")
    scenes = draw_scenes(args.output / "scenes", size, args.cutouts)
    timings = {"scenes": time.monotonic() - started}
    console.rule("Parts")
    parts = prepare_parts(args.size, args.parts, args.output, args.cutouts)
    timings["parts"] = time.monotonic() - started - sum(timings.values())
    console.print(f"Pretrained language model and vision tower: {parts}")

    console.rule("Training")
    plans = {seed: plan(args.size, seed) for seed in args.seeds}
    total = sum(steps_of(run.recipe, size) for runs in plans.values() for run in runs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    done = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total)
        for seed, runs in plans.items():
            folder = args.output / f"seed-{seed}"
            save_start(parts, folder / Start().name, seed, size.cross_attention_layers, Start())
            done = train(runs, folder, scenes, size, progress, task, done)

    console.rule("Evaluation on unseen scenes")
    timings["training"] = time.monotonic() - started - sum(timings.values())
    variants = [variant_results(name, plans, args.output, scenes) for name in VARIANTS]
    first = args.output / f"seed-{args.seeds[0]}"
    checkpoints = {TITLES[name]: first / f"stage4-{name}" for name in VARIANTS}
    examples = draw_examples(checkpoints, scenes, args.output / "examples", count=6)
    timings["evaluation"] = time.monotonic() - started - sum(timings.values())
    write_report(
        args.output / "report.html",
        args.output / "report.json",
        {
            "title": f"AGE-VLM quickstart, size {args.size}",
            "variants": variants,
            "examples": examples,
            "settings": settings(args.size, args.seeds, plans),
            "versions": library_versions(),
            "commit": git_commit(),
            "seconds": timings,
        },
    )
    console.print(f"Report: {args.output / 'report.html'} ({(time.monotonic() - started) / 60:.1f} minutes)")
