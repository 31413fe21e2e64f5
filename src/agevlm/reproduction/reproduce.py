"""`agevlm reproduce`: rows of the matrix on scenes, at equal compute and seeds, and one report (sections 3 to 5).

Work is a graph of steps (a stage run, the measuring of a row). A step whose result exists does nothing. A step that
fails is named, the steps that need it are left out, the others run. The report holds every finished row of the folder
and lists the others. The quickstart is a choice of rows: each verb resumes the other's folders.
"""

import argparse
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from agevlm.analysis.padding import measure_padding
from agevlm.analysis.pairs import Pair, load_pairs
from agevlm.analysis.similarity import write_similarity
from agevlm.analysis.subjects import Subject
from agevlm.data.parallel import worker_pool
from agevlm.data.scenes.build import load_benchmark
from agevlm.evaluation import pope
from agevlm.evaluation.run import RESULT, evaluate, stored_fingerprint
from agevlm.images import open_image
from agevlm.models import load
from agevlm.progress import Bar, start_lines, written
from agevlm.store import digest, locked, write_json
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.features import why_not
from agevlm.training.lineage import read_lineage
from agevlm.training.run_stage import run_stage

from .matrix import ROWS, SIZES, Row, Run, chain, choose_rows, unique
from .prepare import (
    OWN,
    QUESTIONS,
    SPLIT,
    claim_inputs,
    draw_questions,
    draw_scenes,
    prepare_parts,
    question_sets,
    rows_of,
    save_start,
    state_parts,
    state_questions,
    state_text,
)
from .report import write_report
from .scores import PADDING, SIMILARITY, Trained


MAX_NEW_TOKENS = 32
MISMATCHED_SEEDS = (0, 1, 2)  # of the similarity
CURVE_POINTS = 12  # of a learning curve


@dataclass(frozen=True)
class Place:
    """Where things lie: everything in `output`, but the pretrained `parts`, own `questions` and a plain `text`."""

    output: Path
    size: str
    parts: Path = Path()
    questions: Path | None = None
    text: Path | None = None

    @property
    def scenes(self) -> Path:
        return self.output / "scenes"

    @property
    def curve(self) -> Path:
        """The questions of the learning curves."""
        return self.output / "curve.parquet"

    def folder(self, seed: int, run: Run) -> Path:
        """Of a stage run."""
        return self.output / f"seed-{seed}" / run.name

    def measured(self, seed: int, row: Row) -> Path:
        """Of what is measured on the last run of a row."""
        return self.output / f"seed-{seed}" / "measured" / row.name

    def is_trained(self, seed: int, run: Run) -> bool:
        lineage = read_lineage(self.folder(seed, run))
        return lineage is not None and lineage["status"] == "finished"

    def is_measured(self, seed: int, row: Row) -> bool:
        asked = [name for name, (split, _) in QUESTIONS.items() if split in SIZES[self.size].splits]
        asked += [OWN] if self.questions is not None else []
        files = (*(f"{name}/{RESULT}" for name in asked), SIMILARITY, PADDING)
        return all((self.measured(seed, row) / name).is_file() for name in files)


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One piece of work: `call` may run in another process once the steps `after` are done."""

    name: str
    call: Callable[[], None]
    after: tuple[str, ...] = ()


def train_step(place: Place, seed: int, run: Run) -> None:
    """One stage run, with the model it starts from if it is the first."""
    origin = place.output / f"seed-{seed}" / (run.parent or run.start.name)
    if run.parent is None:
        with locked(origin):
            save_start(place.parts, origin, seed, SIZES[place.size], run.start)
    twin = {} if run.start.twin == "no" else {"variant": "twin", "mask_fraction": 0.0}
    with locked(place.folder(seed, run)) as folder:
        rows = rows_of(place.scenes, run)
        recipe = run.recipe.override(**twin, answer_steps=max(1, SIZES[place.size].steps(run.recipe) // CURVE_POINTS))
        args = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=str(folder)))
        run_stage(
            recipe,
            folder,
            data=rows,
            init_from=origin,
            # From scratch, a language model knows none before stage 4
            language=None if SIZES[place.size].scratch else place.text or place.scenes,
            stored_features=place.output / "features" if why_not(recipe, args) is None else None,
            answers=place.curve if recipe.data == "instructions" else None,
            args=args,
            name=f"seed-{seed}/{run.name}",
            console=Console(quiet=True, markup=False),
        )


def measure_step(place: Place, seed: int, row: Row, run: Run) -> None:
    """Questions and looking, similarity, padding of a row's model, which its last run trained."""
    checkpoint, size = str(place.folder(seed, run)), SIZES[place.size]
    dtype = torch.bfloat16 if run.recipe.training["bf16"] else torch.float32  # that of the training
    subject = Subject(*load(checkpoint, dtype=dtype))
    with locked(place.measured(seed, row)) as folder:
        for name, source, benchmarks, rows in question_sets(place.scenes, place.questions):
            evaluate(
                subject.model,
                subject.processor,
                benchmarks,
                rows,
                folder / name,
                source=source,
                name=row.title,
                weights=stored_fingerprint(checkpoint),
                batch_size=50,
                max_new_tokens=MAX_NEW_TOKENS,
                progress=False,
            )
        if not (folder / SIMILARITY).is_file():
            pairs, left_out = load_pairs(place.scenes, size.pairs, distinct=True)
            settings: dict[str, Any] = {"seeds": MISMATCHED_SEEDS, "batch_size": 50, "progress": False}
            write_similarity(subject, row.title, pairs, (folder / SIMILARITY).parent, left_out, **settings)
        if not (folder / PADDING).is_file():
            oblong = oblong_pairs(place.scenes, size.oblong)
            write_json(folder / PADDING, measure_padding(subject, oblong, progress=False))


def oblong_pairs(scenes: Path, count: int) -> list[Pair]:
    """The first `count` presence questions with a mask, their pictures cut to the middle 16 : 9: scenes are square."""
    pairs: list[Pair] = []
    for row in load_benchmark(scenes, SPLIT, pope.PAPER.name):
        if row["mask"] is None or len(pairs) == count:
            continue
        image = open_image(row["image"], f"row {row['id']}, field image")
        mask = open_image(row["mask"], f"row {row['id']}, field mask", mode="1")
        height = image.width * 9 // 16
        top = (image.height - height) // 2
        box = (0, top, image.width, top + height)
        pairs.append(Pair(row["id"], image.crop(box), row["question"], mask.crop(box)))
    return pairs


def make_steps(place: Place, rows: Sequence[Row], seeds: Sequence[int]) -> list[Step]:
    """All work in the order of its dependencies: seed by seed, rows in their order."""
    steps: dict[str, Step] = {}
    for seed in seeds:
        for row in rows:
            after: tuple[str, ...] = ()
            for run in chain(row, place.size, seed):
                name = f"seed-{seed}/{run.name}"
                steps.setdefault(name, Step(name, partial(train_step, place, seed, run), after))
                after = (name,)
            name = f"seed-{seed}/measure {row.name}"
            steps[name] = Step(name, partial(measure_step, place, seed, row, run), after)
    return list(steps.values())


class _Here(Executor):
    """Does a call at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def execute(steps: Sequence[Step], jobs: int, strict: bool, tell: Callable[[str], None]) -> dict[str, str]:
    """Do all steps, `jobs` at a time, each in a process of its own; one job stays in this process.

    Args:
        strict: raise what a step raises.
        tell: gets one line for every step.

    Returns:
        Name -> reason of every step that failed or could not be begun.
    """
    failed: dict[str, str] = {}
    done: set[str] = set()
    waiting, running = list(steps), dict[Future, Step]()
    with _Here() if jobs == 1 else worker_pool(jobs, _start_worker, jobs) as pool:
        while waiting or running:
            for step in list(waiting):
                if missing := next((name for name in step.after if name in failed), None):
                    failed[step.name] = f"needs {missing}"
                    tell(f"{step.name} left out: {failed[step.name]}")
                elif len(running) < jobs and done.issuperset(step.after):
                    running[pool.submit(_timed, step.call)] = step
                else:
                    continue
                waiting.remove(step)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step, death = running.pop(future), future.exception()  # death: of the process itself
                error, seconds = (death, 0.0) if death is not None else future.result()
                if error is None:
                    done.add(step.name)
                    tell(f"{step.name}: {seconds:.0f} s")
                    continue
                if strict:
                    raise error
                failed[step.name] = f"{type(error).__name__}: {error}"
                tell(f"{step.name} failed: {failed[step.name]}")
    return failed


def _timed(call: Callable[[], None]) -> tuple[BaseException | None, float]:
    """The error of a call, and how long it took."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:
        return error, time.monotonic() - started
    return None, time.monotonic() - started


def _start_worker(jobs: int) -> None:
    """Its share of the cores: small models lose more to threads that wait for each other than they gain."""
    quiet()
    start_lines()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


# -- the verbs --------------------------------------------------------------------------------------------------------


def describe(place: Place, rows: Sequence[Row], seeds: Sequence[int], console: Console) -> None:
    """Print the matrix and the steps that remain; nothing is changed."""
    every = [(seed, run) for seed in seeds for run in unique(chain(row, place.size, seed) for row in rows)]
    rest = [(seed, run) for seed, run in every if not place.is_trained(seed, run)]
    table = Table("row", "group", "what", "stage runs", title=f"Matrix, size {place.size}, seeds {seeds}")
    seen: set[str] = set()
    for row in rows:
        names = [run.name for run in chain(row, place.size, seeds[0])]
        runs = Text(" > ").join(Text(name, "dim" if name in seen else "") for name in names)
        table.add_row(row.name, row.group, row.title, runs)
        seen.update(names)
    console.print(table)
    steps = sum(SIZES[place.size].steps(run.recipe) for _, run in rest)
    measures = sum(not place.is_measured(seed, row) for row in rows for seed in seeds)
    console.print(
        f"{len(rows)} rows x {len(seeds)} seeds: {len(every)} stage runs (shared ones once), {len(every) - len(rest)} "
        f"finished, {len(rest)} to do ({steps:,} steps), {measures} rows to measure"
    )


def collect(place: Place) -> dict[str, dict[int, Trained]]:
    """All rows that have been evaluated, in the matrix's order, by seed."""
    names = [folder.name.removeprefix("seed-") for folder in place.output.glob("seed-*")]
    seeds = sorted(int(name) for name in names if name.isdigit())
    found: dict[str, dict[int, Trained]] = {}
    for row in ROWS.values():
        for seed in seeds:
            measured, path = place.measured(seed, row), chain(row, place.size, seed)
            if (measured / "evaluation" / RESULT).is_file():
                stages = [(run.recipe, place.folder(seed, run)) for run in path]
                steps = sum(SIZES[place.size].steps(recipe) for recipe, _ in stages)
                found.setdefault(row.name, {})[seed] = Trained(measured, stages, steps)
    return found


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm quickstart` and `agevlm reproduce`, with the arguments of `cli.py`."""
    rows = choose_rows(args.only)
    console, started = Console(markup=False), time.monotonic()
    if args.dry_run:
        describe(Place(args.output, args.size), rows, args.seeds, console)
        return
    if args.size == "small" and args.cutouts is None:
        raise ValueError(
            "The size `small` is made of real cut-out pictures: agevlm data cutouts --output cutouts, then "
            "--cutouts cutouts."
        )
    size = SIZES[args.size]
    if size.scratch and args.text is not None:
        raise ValueError(f"--text: a language model from scratch (size {args.size}) knows none; leave it out")
    quiet()
    # What is wrong with own files is said before anything is trained
    inputs = {} if args.questions is None else {"questions": state_questions(args.questions)}
    inputs |= {} if size.scratch else {"text": state_text(args.text)}
    with locked(args.output):  # other calls wait until all is prepared
        claim_inputs(args.output, inputs)
        parts = prepare_parts(args.size, args.parts, args.output, args.cutouts)
        claim_inputs(args.output, {"parts": state_parts(parts)})
        place = Place(args.output, args.size, parts, args.questions, args.text)
        drawn = draw_scenes(place.scenes, size, args.cutouts) / "scenes.json"
        claim_inputs(args.output, {"pictures": {"digest": digest(drawn.read_bytes())}})
        draw_questions(place.curve, size, args.cutouts)
    console.print(f"Pretrained language model and vision tower: {place.parts}")
    describe(place, rows, args.seeds, console)
    prepared = time.monotonic()
    steps = make_steps(place, rows, args.seeds)
    with Bar(total=len(steps), desc=args.output.name, unit="step") as bar:

        def tell(line: str) -> None:
            bar.write(line)
            bar.update()

        jobs = args.jobs or (1 if torch.accelerator.is_available() else 2)
        failed = execute(steps, jobs, args.strict, tell)
    seconds = {"scenes and parts": prepared - started, "training and measuring": time.monotonic() - prepared}
    write_report(args.output, args.size, place.scenes, collect(place), failed, seconds, place.questions)
    page = args.output / "report.html"
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    ends = {str(place.folder(args.seeds[0], chain(row, place.size, args.seeds[0])[-1])) for row in (rows[-1], rows[0])}
    written(page, "" if failed else f"agevlm demo {shlex.join(sorted(ends, reverse=True))}")
    if failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} step(s) are missing; the same command tries them again:\n{lines}")
