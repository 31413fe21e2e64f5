"""`agevlm reproduce`: every row of the matrix on scenes, at equal compute and seeds, and one report (sections 3 to 5).

    agevlm reproduce --dry-run                                       # the matrix and its runs
    agevlm reproduce --seeds 0 1 2 --only main --quickstart runs/quickstart
    agevlm reproduce --only guidance normalisation                   # more rows into the same folder

Work is a graph of steps (a stage run, the measuring of a row), each of which does nothing where its result lies. A
step that fails is named, what needs it is left out, the rest goes on. The report holds whatever is finished in the
folder, and lists what is not.

`--quickstart` takes finished runs of `agevlm quickstart`: those whose recipes are the same from the start on. Their
recorded settings are compared; what later versions of the code added to a recipe is not in the record and cannot be.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from agevlm.analysis.padding import measure_padding
from agevlm.analysis.pairs import Pair, load_pairs
from agevlm.analysis.similarity import write_similarity
from agevlm.analysis.subjects import Subject
from agevlm.data.masks import join_masks
from agevlm.data.scenes.build import load_benchmark, load_rows
from agevlm.evaluation import pope
from agevlm.evaluation.run import RESULT, evaluate_scenes, stored_fingerprint
from agevlm.images import open_image
from agevlm.models import load
from agevlm.reproduction.findings import write_findings
from agevlm.reproduction.matrix import Row, Run, chain, choose_rows, matrix, unique
from agevlm.reproduction.queries import things_named, vocabulary
from agevlm.reproduction.quickstart import (
    MAX_NEW_TOKENS,
    SIZES,
    SPLIT,
    Size,
    draw_scenes,
    plan,
    prepare_parts,
    save_start,
    steps_of,
)
from agevlm.store import as_json, changed_fields, write_json
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.lineage import read_lineage, training_identity
from agevlm.training.run_stage import run_stage


PAIRS, MISMATCHED_SEEDS = 150, (0, 1, 2)  # of the similarity
OBLONG = 80  # pictures of the padding
SIMILARITY, PADDING = "similarity/similarity.json", "padding.json"


@dataclass(frozen=True)
class Place:
    """Where things lie. `quickstart`: a folder of finished runs to take from."""

    output: Path
    size: str
    parts: Path
    scenes: Path
    quickstart: Path | None = None

    def taken(self, seed: int, run: Run) -> Path | None:
        """The finished run of the quickstart that is this one, None where there is none.

        Raises:
            ValueError: it was trained with other settings.
        """
        names = {known.address: known.name for known in plan(self.size, seed)}
        if self.quickstart is None or run.address not in names:
            return None
        folder = self.quickstart / f"seed-{seed}" / names[run.address]
        lineage = read_lineage(folder)
        if lineage is None or lineage["status"] != "finished":
            return None
        check_same(run, lineage, SIZES[self.size], folder)
        return folder

    def folder(self, seed: int, run: Run) -> Path:
        """Of a stage run."""
        return self.taken(seed, run) or self.output / f"seed-{seed}" / run.name

    def measured(self, seed: int, path: Sequence[Run]) -> Path:
        """Of what is measured on the last run of a row."""
        return self.output / f"seed-{seed}" / "measured" / path[-1].name

    def is_measured(self, seed: int, path: Sequence[Run]) -> bool:
        folder = self.measured(seed, path)
        return all((folder / name).is_file() for name in (f"evaluation/{RESULT}", SIMILARITY, PADDING))


def check_same(run: Run, lineage: Mapping[str, Any], size: Size, folder: Path) -> None:
    """Raises ValueError if a finished run's record contradicts a run of the matrix."""
    recipe, record = run.recipe, lineage["recipe"]
    arguments = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=str(folder)))
    rows = getattr(size, recipe.data)
    now = as_json(
        {
            "stage": recipe.stage,
            "trains": recipe.trains,
            "frozen": recipe.frozen,
            "training": training_identity(arguments),
            "data": {"rows": rows, "mask_fraction": recipe.mask_fraction},
        }
    )
    told = {name: record.get(name) for name in ("stage", "trains", "frozen")}
    told["data"] = {name: lineage["data"][name] for name in now["data"]}
    told["training"] = {name: record["training"].get(name, value) for name, value in now["training"].items()}
    if changed := changed_fields(told, now):
        raise ValueError(f"{folder} was trained otherwise ({'; '.join(changed)}); leave --quickstart out")


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One piece of work: `call` may run in another process once the steps `after` are done."""

    name: str
    call: Callable[[], None]
    after: tuple[str, ...] = ()


def train_step(place: Place, seed: int, run: Run, parent: Run | None) -> None:
    """One stage run, with the model it starts from if it is the first."""
    if place.taken(seed, run) is not None:
        return
    size, folder = SIZES[place.size], place.output / f"seed-{seed}"
    if parent is None:
        origin = folder / run.start.name
        save_start(place.parts, origin, seed, size.cross_attention_layers, run.start)
    else:
        origin = place.folder(seed, parent)
    rows = rows_of(place.scenes, run)
    twin = {} if run.start.twin == "no" else {"variant": "twin", "mask_fraction": 0.0}
    run_stage(run.recipe.override(**twin), folder / run.name, data=rows, init_from=origin, console=Console(quiet=True))


def rows_of(scenes: Path, run: Run) -> Dataset:
    """The training rows of a run, with the query its recipe asks for."""
    part, fraction = run.recipe.data, run.recipe.mask_fraction
    if run.query == "text":
        return load_rows(scenes, part, mask_fraction=fraction)
    rows = Dataset.from_parquet(str(scenes / part / "train.parquet"))
    masks = Dataset.from_parquet(str(scenes / "masks" / f"{part}.parquet"))
    features = masks.features
    words = vocabulary(scenes)
    queries = [things_named(query, words) for query in masks["query"]]
    masks = masks.remove_columns("query").add_column("query", queries).select_columns(list(features)).cast(features)
    return join_masks(rows, masks, fraction)


def measure_step(place: Place, seed: int, row: Row, path: Sequence[Run]) -> None:
    """Benchmarks and looking, similarity, padding of one row's final model."""
    folder, checkpoint = place.measured(seed, path), str(place.folder(seed, path[-1]))
    subject = Subject(*load(checkpoint))
    evaluate_scenes(
        subject.model,
        subject.processor,
        place.scenes,
        SPLIT,
        folder / "evaluation",
        name=row.title,
        weights=stored_fingerprint(checkpoint),
        batch_size=50,
        max_new_tokens=MAX_NEW_TOKENS,
        progress=False,
    )
    if not (folder / SIMILARITY).is_file():
        pairs, left_out = load_pairs(place.scenes, PAIRS, distinct=True)
        settings: dict[str, Any] = {"seeds": MISMATCHED_SEEDS, "batch_size": 50, "progress": False}
        write_similarity(subject, row.title, pairs, (folder / SIMILARITY).parent, left_out, **settings)
    if not (folder / PADDING).is_file():
        write_json(folder / PADDING, measure_padding(subject, oblong_pairs(place.scenes), progress=False))


def oblong_pairs(scenes: Path) -> list[Pair]:
    """The first presence questions with a mask, their pictures cut to the middle 16 : 9: scenes are square."""
    pairs: list[Pair] = []
    for row in load_benchmark(scenes, SPLIT, pope.PAPER.name):
        if row["mask"] is None or len(pairs) == OBLONG:
            continue
        image = open_image(row["image"], f"row {row['id']}, field image")
        mask = open_image(row["mask"], f"row {row['id']}, field mask", mode="1")
        height = image.width * 9 // 16
        top = (image.height - height) // 2
        box = (0, top, image.width, top + height)
        pairs.append(Pair(row["id"], image.crop(box), row["question"], mask.crop(box)))
    return pairs


def make_steps(place: Place, rows: Sequence[Row], seeds: Sequence[int]) -> list[Step]:
    """All work, what is needed first in front: seed by seed, rows in their order."""
    steps: dict[str, Step] = {}
    for seed in seeds:
        for row in rows:
            path = chain(row, place.size, seed)
            parent: Run | None = None
            for run in path:
                name = f"seed-{seed}/{run.name}"
                after = () if parent is None else (f"seed-{seed}/{parent.name}",)
                steps.setdefault(name, Step(name, partial(train_step, place, seed, run, parent), after))
                parent = run
            last = f"seed-{seed}/{path[-1].name}"
            name = f"seed-{seed}/measure {row.name}"
            steps[name] = Step(name, partial(measure_step, place, seed, row, path), (last,))
    return list(steps.values())


def execute(steps: Sequence[Step], jobs: int, strict: bool, tell: Callable[[str], None]) -> dict[str, str]:
    """Do all steps, `jobs` at a time, each in a process that sees one accelerator; one job stays in this process.

    Args:
        tell: gets one line for every step.

    Returns:
        Name -> reason of every step that failed or could not be begun.
    """
    failed: dict[str, str] = {}

    def left_out(step: Step) -> bool:
        missing = next((name for name in step.after if name in failed), None)
        if missing is not None:
            failed[step.name] = f"needs {missing}"
            tell(f"{step.name} left out: {failed[step.name]}")
        return missing is not None

    def note(step: Step, error: BaseException | None, seconds: float) -> None:
        if error is not None:
            failed[step.name] = f"{type(error).__name__}: {error}"
        tell(f"{step.name}: {seconds:.0f} s" if error is None else f"{step.name} failed: {failed[step.name]}")

    if jobs == 1:
        for step in steps:
            if left_out(step):
                continue
            error, seconds = _timed(step.call)
            note(step, error, seconds)
            if error is not None and strict:
                raise error
        return failed
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for job in range(jobs):
        devices.put(_device(job))
    waiting, done = list(steps), set[str]()
    running: dict[Future, Step] = {}
    with ProcessPoolExecutor(jobs, context, _bind, (devices,)) as pool:
        while waiting or running:
            waiting = [step for step in waiting if not left_out(step)]
            for step in [step for step in waiting if done.issuperset(step.after)][: jobs - len(running)]:
                running[pool.submit(_timed, step.call)] = step
                waiting.remove(step)
            finished: set[Future] = wait(running, return_when=FIRST_COMPLETED)[0]
            for future in finished:
                step, death = running.pop(future), future.exception()  # death: of the process itself
                error, seconds = (death, 0.0) if death is not None else future.result()
                note(step, error, seconds)
                if error is None:
                    done.add(step.name)
                elif strict:
                    pool.shutdown(cancel_futures=True)
                    raise error
    return failed


def _timed(call: Callable[[], None]) -> tuple[BaseException | None, float]:
    """What a call raised, and how long it took."""
    started = time.monotonic()
    try:
        call()
    except Exception as error:
        return error, time.monotonic() - started
    return None, time.monotonic() - started


def _device(job: int) -> str | None:
    """What the job's process may see, out of what this one may; None without accelerators."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return known[job % len(known)] if known else None


def _bind(devices: Any) -> None:
    """In a fresh process, before anything asks for an accelerator."""
    device = devices.get()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    quiet()


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


# -- the plan ---------------------------------------------------------------------------------------------------------


def describe(place: Place, rows: Sequence[Row], seeds: Sequence[int], console: Console) -> dict[str, int]:
    """Print the matrix and what is to be done; nothing is changed."""
    size = SIZES[place.size]
    every = [(seed, run) for seed in seeds for run in unique(chain(row, place.size, seed) for row in rows)]
    is_done = {(seed, run.name): _finished(place.folder(seed, run)) for seed, run in every}
    rest = [(seed, run) for seed, run in every if not is_done[seed, run.name]]
    table = Table("row", "group", "what", "stage runs", title=f"Matrix, size {place.size}, seeds {list(seeds)}")
    seen: set[str] = set()
    for row in rows:
        names = [run.name for run in chain(row, place.size, seeds[0])]
        shown = [f"[dim]{name}[/dim]" if name in seen else name for name in names]
        seen.update(names)
        table.add_row(row.name, row.group, row.title, " > ".join(shown))
    console.print(table)
    steps = sum(steps_of(run.recipe, size) for _, run in rest)
    measures = sum(not place.is_measured(seed, chain(row, place.size, seed)) for row in rows for seed in seeds)
    console.print(
        f"{len(rows)} rows x {len(seeds)} seeds: {len(every)} stage runs (shared ones once), {len(every) - len(rest)} "
        f"finished, {len(rest)} to do ({steps:,} steps), {measures} rows to measure"
    )
    return {"runs": len(every), "finished": len(every) - len(rest), "steps": steps, "measures": measures}


def _finished(folder: Path) -> bool:
    lineage = read_lineage(folder)
    return lineage is not None and lineage["status"] == "finished"


def collect(place: Place) -> dict[str, dict[int, dict[str, Any]]]:
    """Row -> seed -> where the measured things and the stage runs lie, of all that has been evaluated."""
    seeds = sorted(
        int(folder.name.removeprefix("seed-"))
        for folder in place.output.glob("seed-*")
        if folder.name.removeprefix("seed-").isdigit()
    )
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in matrix():
        paths = {seed: chain(row, place.size, seed) for seed in seeds}
        found[row.name] = {
            seed: {
                "measured": place.measured(seed, path),
                "stages": [(run.recipe, place.folder(seed, run)) for run in path],
                "steps": sum(steps_of(run.recipe, SIZES[place.size]) for run in path),
            }
            for seed, path in paths.items()
            if (place.measured(seed, path) / "evaluation" / RESULT).is_file()
        }
    return found


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm reproduce`, with the arguments of `cli.py`."""
    rows = choose_rows(args.only)
    jobs = args.jobs or max(1, torch.cuda.device_count())
    if args.quickstart is not None and not args.quickstart.is_dir():
        raise ValueError(f"--quickstart {args.quickstart}: no such folder")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: must be at least 1")
    quiet()
    console, size, started = Console(), SIZES[args.size], time.monotonic()
    source = args.quickstart or args.output
    if args.dry_run:
        place = Place(args.output, args.size, args.parts or Path(), source / "scenes", args.quickstart)
        describe(place, rows, args.seeds, console)
        return
    if args.size == "small" and args.cutouts is None:
        raise ValueError("The size `small` needs --cutouts: agevlm data cutouts --output cutouts")
    scenes = draw_scenes(source / "scenes", size, args.cutouts)
    parts = prepare_parts(args.size, args.parts, args.output, args.cutouts)
    place = Place(args.output, args.size, parts, scenes, args.quickstart)
    describe(place, rows, args.seeds, console)
    steps = make_steps(place, rows, args.seeds)
    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(steps))

        def tell(line: str) -> None:
            console.print(line, highlight=False, markup=False)
            progress.advance(task)

        failed = execute(steps, jobs, args.strict, tell)
    write_findings(args.output, args.size, scenes, collect(place), failed, time.monotonic() - started)
    console.print(f"Report: {args.output / 'report.html'} ({(time.monotonic() - started) / 60:.1f} minutes)")
    if failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise ValueError(f"{len(failed)} step(s) are missing; the same command tries them again:\n{lines}")
