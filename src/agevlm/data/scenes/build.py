"""Builds the grounded scenes: composed pictures with exact masks as training rows and benchmarks, no download needed.

The folder holds captions/train.parquet, instructions/train.parquet, masks/{captions,instructions}.parquet,
benchmarks/<split>/<benchmark>.parquet, scenes.json (what it was built from) and contact_sheet.png. Its content depends
on the arguments alone, not on the number of processes.
"""

import dataclasses
import multiprocessing
import random
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from tqdm import tqdm

from agevlm.data.masks import join_masks, share_of_masks
from agevlm.data.rows import MASK_FEATURES, ROW_FEATURES
from agevlm.store import as_json, check_same, digest, new_folder, read_json, write_json

from .arguments import SceneArguments
from .benchmarks import BENCHMARKS, FEATURES, GROUP, benchmark_rows
from .builder import SceneBuilder, make_source
from .contact_sheet import draw_contact_sheet
from .conversations import Message, text_conversations
from .splits import SPLITS, held_out_names, held_out_style, is_held_out_pair, make_pools


FORMAT = 2  # raise when the same arguments would give other pictures or questions (2: choices of counts shuffled)
PARTS = ("captions", "instructions")
_CHUNK = 256


def build_scenes(
    out: str | Path,
    *,
    captions: int = 20_000,
    instructions: int = 10_000,
    test: int = 500,
    size: int = 224,
    max_objects: int = 4,
    turns: int = 4,
    seed: int = 0,
    cutouts: str | Path | None = None,
    backgrounds: str | Path | None = None,
    names: Collection[str] | None = None,
    colors: Collection[str] | None = None,
    word_rate: float = 0.25,
    num_proc: int = 1,
    progress: bool = True,
) -> Path:
    """Builds a folder of scenes, or returns at once where `out` already holds exactly this one.

    Args:
        captions, instructions: numbers of training rows (one picture each).
        test: number of questions of each benchmark in each split (HallusionBench: rounded down to whole sets of 4).
        size: side of the pictures in pixels.
        max_objects: most objects in a picture, 1 to 4 (questions that need two are given two).
        turns: questions per instruction row.
        cutouts: folder made by `agevlm.data.scenes.fetch_cutouts`; None draws icons.
        backgrounds: folder of photographs to paste on; None generates backgrounds.
        names, colors: restrict the objects; unknown ones raise ValueError with close matches.
        word_rate: share of instruction pictures with a sign on them (captions: half of it).
        num_proc: worker processes; started afresh ("spawn"), so a script must guard its main part.

    Raises ValueError where `out` holds anything else, as nothing is ever overwritten, and where workers cannot run.
    """
    arguments = SceneArguments(
        captions, instructions, test, size, max_objects, turns, seed,
        str(cutouts) if cutouts is not None else None, str(backgrounds) if backgrounds is not None else None,
        tuple(sorted(names)) if names is not None else None,
        tuple(sorted(colors)) if colors is not None else None, word_rate,
    )  # fmt: skip
    out = Path(out)
    builder = SceneBuilder(arguments)
    manifest = _manifest(builder)
    if _is_finished(out, manifest):
        return out
    with new_folder(out) as temporary:
        _fill(temporary, builder, num_proc, progress)
        write_json(temporary / "scenes.json", manifest)
    return out


def load_rows(
    folder: str | Path,
    part: Literal["captions", "instructions"],
    mask_fraction: float = 1.0,
    seed: int = 0,
    masks: Dataset | None = None,
) -> Dataset:
    """Training rows of a folder of scenes with their `guidance` column.

    `mask_fraction`: share of the rows that are guided, chosen by a hash of their id and `seed`; null elsewhere. Where
    there are fewer masks, all are used. `masks`: in place of those that were drawn with the scenes."""
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; use one of {', '.join(PARTS)}")
    rows = _read(Path(folder) / part / "train.parquet")
    if masks is None:
        masks = _read(Path(folder) / "masks" / f"{part}.parquet")
    return join_masks(rows, masks, share_of_masks(mask_fraction, len(rows), len(masks)), seed)


def load_benchmark(folder: str | Path, split: str, benchmark: str) -> Dataset:
    """Questions of one benchmark (`benchmarks.BENCHMARKS`) in one split (`splits.SPLITS`)."""
    for what, value, known in (("split", split, SPLITS), ("benchmark", benchmark, BENCHMARKS)):
        if value not in known:
            raise ValueError(f"{what} is {value!r}; use one of {', '.join(known)}")
    return _read(Path(folder) / "benchmarks" / split / f"{benchmark}.parquet")


def text_corpus(
    n: int,
    seed: int = 0,
    names: Collection[str] | None = None,
    colors: Collection[str] | None = None,
    cutouts: str | Path | None = None,
) -> Iterator[list[Message]]:
    """`n` conversations without pictures in the wording of the picture rows, for training a language model alone.

    `names`, `colors` and `cutouts` as in `build_scenes`. Held-out names occur (a model must know a word to be asked
    about it), held-out (color, name) pairs do not.
    """
    source = make_source(cutouts, names, colors)
    pool = make_pools(source.kinds, source.colors)["text"]
    return text_conversations(random.Random(f"{seed}/text"), pool, n)


def _read(path: Path) -> Dataset:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; build the folder with `agevlm data scenes`")
    state = path.stat()
    identity = f"{path.resolve()}/{state.st_mtime_ns}/{state.st_size}"
    # a given fingerprint spares `datasets` from hashing every picture
    return Dataset(pq.read_table(path), fingerprint=digest(identity, size=8))


# -- writing ---------------------------------------------------------------------------------------------------------


def _manifest(builder: SceneBuilder) -> dict:
    source, arguments, kinds = builder.source, builder.arguments, builder.source.kinds
    old = {"colors": "colours"}  # as folders have it that were built before
    left_out = ("cutouts", "backgrounds")  # folders count by content, not by path
    manifest = {
        "format": FORMAT,
        "arguments": {old.get(k, k): v for k, v in dataclasses.asdict(arguments).items() if k not in left_out},
        "source": {"kind": source.name, "table": source.digest, "backgrounds": builder.backgrounds_digest},
        "counts": {
            **{part: getattr(arguments, part) for part in PARTS},
            **{f"benchmarks/{s}/{b}": _groups(b, arguments.test) * GROUP[b] for s in SPLITS for b in BENCHMARKS},
        },
        "names": sorted(kinds),
        "colours": list(source.colors),
        "held_out": {
            "names": list(held_out_names(kinds)),
            "pairs": sorted([c, n] for n in kinds for c in source.colors if is_held_out_pair(c, n)),
            "styles": {n: style for n, kind in sorted(kinds.items()) if (style := held_out_style(kind))},
        },
    }
    return as_json(manifest)  # tuples as the file will have them


def _is_finished(out: Path, manifest: dict) -> bool:
    """Whether `out` holds what `manifest` describes; ValueError where it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "scenes.json").is_file():
        raise ValueError(f"{out} is not empty and holds no scenes; choose another folder")
    # All else in it follows from these.
    found, asked = (
        {"format": m.get("format"), "source": m.get("source"), **m.get("arguments", {})}
        for m in (read_json(out / "scenes.json"), manifest)
    )
    check_same(out, found, asked, "set of scenes")
    return True


def _groups(benchmark: str, test: int) -> int:
    return test // GROUP[benchmark]


_builder: SceneBuilder  # one for each process that draws


def _start_worker(builder: SceneBuilder) -> None:
    global _builder
    _builder = builder


def _start_spawned_worker(arguments: SceneArguments) -> None:
    _start_worker(SceneBuilder(arguments))


def _draw_training(job: tuple[str, int, int]) -> tuple[pa.Table, pa.Table]:
    part, start, stop = job
    make = _builder.caption_row if part == "captions" else _builder.instruction_row
    rows, masks = zip(*(make(index) for index in range(start, stop)), strict=True)
    return _table(rows, ROW_FEATURES), _table(masks, MASK_FEATURES)


def _draw_benchmark(job: tuple[str, str, int, int]) -> tuple[pa.Table]:
    split, benchmark, start, stop = job
    groups = (benchmark_rows(_builder, split, benchmark, index) for index in range(start, stop))
    return (_table(chain.from_iterable(groups), FEATURES[benchmark]),)


def _table(rows, features: Features) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=features.arrow_schema)


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _write(files: dict[Path, Features], tables: Iterator[tuple[pa.Table, ...]], bar: tqdm) -> None:
    """Writes the n-th table of every tuple to the n-th file."""
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    writers = [pq.ParquetWriter(path, features.arrow_schema) for path, features in files.items()]
    try:
        for chunk in tables:
            for writer, table in zip(writers, chunk, strict=True):
                writer.write_table(table)
            bar.update(len(chunk[0]))
    finally:
        for writer in writers:
            writer.close()


def _fill(folder: Path, builder: SceneBuilder, num_proc: int, progress: bool) -> None:
    arguments = builder.arguments
    _start_worker(builder)
    if num_proc <= 1:
        _fill_with(folder, arguments, map, progress)
    else:
        context = multiprocessing.get_context("spawn")  # forking a process that has run torch can hang
        # Not `context.Pool`: it would start workers that cannot run again and again, without an end.
        with ProcessPoolExecutor(num_proc, context, _start_spawned_worker, (arguments,)) as workers:
            try:
                _fill_with(folder, arguments, workers.map, progress)
            except BrokenProcessPool as error:
                raise ValueError(
                    f"a worker process ended before its work was done (num_proc is {num_proc}). Call build_scenes "
                    'below `if __name__ == "__main__":`, because every worker imports the script again. Code from '
                    "standard input, or a machine without memory for workers, needs num_proc=1."
                ) from error
            finally:
                workers.shutdown(cancel_futures=True)
    draw_contact_sheet(folder, folder / "contact_sheet.png")


def _fill_with(folder: Path, arguments: SceneArguments, imap: Callable, progress: bool) -> None:
    counts = {part: getattr(arguments, part) for part in PARTS}
    total = sum(counts.values()) + len(SPLITS) * sum(_groups(b, arguments.test) * GROUP[b] for b in BENCHMARKS)
    with tqdm(total=total, desc="scenes", unit="row", disable=not progress) as bar:
        for part, count in counts.items():
            files = {
                folder / part / "train.parquet": ROW_FEATURES,
                folder / "masks" / f"{part}.parquet": MASK_FEATURES,
            }
            _write(files, imap(_draw_training, [(part, *chunk) for chunk in _chunks(count)]), bar)
        for split in SPLITS:
            for benchmark in BENCHMARKS:
                jobs = [(split, benchmark, *chunk) for chunk in _chunks(_groups(benchmark, arguments.test))]
                path = folder / "benchmarks" / split / f"{benchmark}.parquet"
                _write({path: FEATURES[benchmark]}, imap(_draw_benchmark, jobs), bar)
