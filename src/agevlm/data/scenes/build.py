"""Builds the grounded scenes: composed pictures with exact masks as training rows and benchmarks, no download needed.

The folder holds captions/train.parquet, instructions/train.parquet, masks/{captions,instructions}.parquet (one mask a
row), phrases/{captions,instructions}.parquet (one a noun phrase of a caption, one a question with an answer to see),
benchmarks/<split>/<benchmark>.parquet, scenes.json (what it was built from) and contact_sheet.png. Its content depends
on the arguments alone, not on the number of processes.
"""

import dataclasses
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from agevlm.data.masks import MASKS, PHRASES, join_masks, mask_files, mask_places, masks_of, share_of_masks
from agevlm.data.parallel import worker_map
from agevlm.data.rows import MASK_FEATURES, PHRASE_FEATURES, ROW_FEATURES, refuse_names
from agevlm.progress import Bar
from agevlm.store import as_json, check_same, digest, new_folder, read_json, write_json

from .arguments import SPLITS, SceneArguments
from .benchmarks import BENCHMARKS, FEATURES, GROUP, benchmark_rows
from .builder import SceneBuilder, make_source
from .contact_sheet import draw_contact_sheet
from .conversations import Message
from .lessons import LESSONS, Lesson, text_conversations
from .splits import held_out_names, held_out_style, is_held_out_pair, make_pools


# Raise when the same arguments would give other pictures or questions (4: some instruction rows on more than
# presence ask for a caption, the others of them draw other questions; all else is as in 3).
FORMAT = 4
PARTS = ("captions", "instructions")
_CHUNK = 256


def build_scenes(out: str | Path, *, num_proc: int = 1, progress: bool = True, **arguments: Any) -> Path:
    """Builds a folder of scenes, or returns at once where `out` already holds exactly this one.

    Args:
        num_proc: worker processes; see `worker_map`.
        arguments: of `SceneArguments`.

    Raises:
        ValueError: `out` holds anything else, as nothing is ever overwritten; wrong arguments; workers cannot run.
    """
    out = Path(out)
    scenes = SceneArguments(**arguments)
    manifest = _manifest(SceneBuilder(scenes))
    if _is_finished(out, manifest):
        return out
    with new_folder(out) as temporary:
        _fill(temporary, scenes, num_proc, progress)
        write_json(temporary / "scenes.json", manifest)
    return out


def load_rows(
    folder: str | Path,
    part: Literal["captions", "instructions"],
    mask_fraction: float = 1.0,
    masks: Dataset | None = None,
    by_phrase: bool = False,
) -> Dataset:
    """Training rows of a folder of scenes with their `guidance` column.

    `mask_fraction`: share of the rows that are guided, chosen by a hash of their id; null elsewhere. Where
    there are fewer masks, all are used. `masks`: in place of those in the folder (`masks_of`); `by_phrase`: of those,
    the ones by phrase."""
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; use one of {', '.join(PARTS)}")
    rows = _read(Path(folder) / part / "train.parquet")
    drawn = Path(folder) / (PHRASES if by_phrase else MASKS) / f"{part}.parquet"
    if masks is None:
        files = mask_files(folder, part, by_phrase)
        masks = _read(drawn) if files == [str(drawn)] else masks_of(folder, part, by_phrase)
    if masks is None:
        masks = Dataset.from_dict({name: [] for name in MASK_FEATURES}, features=MASK_FEATURES)
    return join_masks(rows, masks, share_of_masks(mask_fraction, len(rows), len(mask_places(masks)[0])))


def load_benchmark(folder: str | Path, split: str, benchmark: str) -> Dataset:
    """Questions of one benchmark (`benchmarks.BENCHMARKS`) in one split (`splits.SPLITS`)."""
    for what, value, known in (("split", split, SPLITS), ("benchmark", benchmark, BENCHMARKS)):
        if value not in known:
            raise ValueError(f"{what} is {value!r}; use one of {', '.join(known)}")
    return _read(Path(folder) / "benchmarks" / split / f"{benchmark}.parquet")


def load_told(folder: str | Path, split: str) -> Dataset:
    """The pictures of a split in words, each with a question: `id`, `image` (null), `question`, `answer`, `kind`,
    `set`.

    They come from the rows of HallusionBench, which hold a description of the picture. `answer` is Yes or No, `kind`
    what was edited in the second picture of a `set`.
    """
    rows = load_benchmark(folder, split, "hallusionbench").remove_columns(["image", "mask"])
    told = [
        {
            "id": row["id"].replace("hallusionbench", "told"),
            "image": None,
            "question": f"Scene: {row['gt_answer_details']} {row['question']} Please answer yes or no.",
            "answer": "Yes" if row["gt_answer"] == "1" else "No",
            "kind": row["subcategory"],
            "set": f"{row['subcategory']}-{row['set_id']}",
        }
        for row in rows
    ]
    texts = {name: Value("string") for name in ("id", "question", "answer", "kind", "set")}
    return Dataset.from_list(told, features=Features({**texts, "image": ImageFeature()}))


def text_corpus(
    n: int,
    seed: int = 0,
    names: Collection[str] | None = None,
    colors: Collection[str] | None = None,
    cutouts: str | Path | None = None,
    lessons: Sequence[Lesson] = LESSONS,
) -> Iterator[list[Message]]:
    """About `n` conversations without pictures, in lessons from easy to hard, for training a language model alone.

    `names`, `colors` and `cutouts` as in `build_scenes`. Held-out names occur (a model must know a word to be asked
    about it), held-out (color, name) pairs do not.
    """
    source = make_source(cutouts, names, colors)
    pool = make_pools(source.kinds, source.colors)["text"]
    return text_conversations(random.Random(f"{seed}/text"), pool, n, lessons)


def _read(path: Path) -> Dataset:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; build the folder with `agevlm data scenes`")
    state = path.stat()
    identity = f"{path.resolve()}/{state.st_mtime_ns}/{state.st_size}"
    # a given fingerprint spares `datasets` from hashing every picture
    return refuse_names(Dataset(pq.read_table(path), fingerprint=digest(identity, size=8)))


# -- writing ---------------------------------------------------------------------------------------------------------


def _manifest(builder: SceneBuilder) -> dict:
    source, arguments, kinds = builder.source, builder.arguments, builder.source.kinds
    old = {"colors": "colours"}  # as folders have it that were built before
    options = dataclasses.asdict(arguments)
    for new, default in (("min_objects", 1), ("presence_first", 0.0), ("splits", SPLITS)):  # unknown to them
        if options[new] == default:
            del options[new]
    left_out = ("cutouts", "backgrounds")  # folders count by content, not by path
    manifest = {
        "format": FORMAT,
        "arguments": {old.get(k, k): v for k, v in options.items() if k not in left_out},
        "source": {"kind": source.name, "table": source.digest, "backgrounds": builder.backgrounds_digest},
        "counts": _counts(arguments),
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
    for part, count in manifest["counts"].items():
        for name in (f"{part}/train", f"{MASKS}/{part}", f"{PHRASES}/{part}") if part in PARTS else (part,):
            if count and not (out / f"{name}.parquet").is_file():
                raise ValueError(f"{out / name}.parquet is missing; delete {out} to build it again")
    return True


def _counts(arguments: SceneArguments) -> dict[str, int]:
    """Rows of each part, and of each benchmark in each split."""
    tests = product(arguments.splits, BENCHMARKS)
    return {
        **{part: getattr(arguments, part) for part in PARTS},
        **{f"benchmarks/{split}/{name}": arguments.test // GROUP[name] * GROUP[name] for split, name in tests},
    }


def _draw_training(builder: SceneBuilder, job: tuple[str, int, int]) -> tuple[pa.Table, pa.Table, pa.Table]:
    part, start, stop = job
    make = builder.caption_row if part == "captions" else builder.instruction_row
    rows, masks, phrases = zip(*(make(index) for index in range(start, stop)), strict=True)
    by_phrase = _table(chain.from_iterable(phrases), PHRASE_FEATURES)
    return _table(rows, ROW_FEATURES), _table(filter(None, masks), MASK_FEATURES), by_phrase


def _draw_benchmark(builder: SceneBuilder, job: tuple[str, str, int, int]) -> tuple[pa.Table]:
    split, benchmark, start, stop = job
    groups = (benchmark_rows(builder, split, benchmark, index) for index in range(start, stop))
    return (_table(chain.from_iterable(groups), FEATURES[benchmark]),)


def _table(rows, features: Features) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=features.arrow_schema)


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _write(files: dict[Path, Features], tables: Iterator[tuple[pa.Table, ...]], bar: Bar) -> None:
    """Writes the n-th table of every tuple to the n-th file."""
    with ExitStack() as stack:
        writers = []
        for path, features in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            writers.append(stack.enter_context(pq.ParquetWriter(path, features.arrow_schema)))
        for chunk in tables:
            for writer, table in zip(writers, chunk, strict=True):
                writer.write_table(table)
            bar.update(len(chunk[0]))


def _fill(folder: Path, arguments: SceneArguments, num_proc: int, progress: bool) -> None:
    counts = _counts(arguments)
    bar = Bar(total=sum(counts.values()), desc="scenes", unit="row", disable=not progress)
    with bar, worker_map(num_proc, SceneBuilder, arguments) as work:
        for part in PARTS:
            files = {
                folder / part / "train.parquet": ROW_FEATURES,
                folder / MASKS / f"{part}.parquet": MASK_FEATURES,
                folder / PHRASES / f"{part}.parquet": PHRASE_FEATURES,
            }
            _write(files, work(_draw_training, [(part, *chunk) for chunk in _chunks(counts[part])]), bar)
        for split, benchmark in product(arguments.splits, BENCHMARKS):
            place = f"benchmarks/{split}/{benchmark}"
            jobs = [(split, benchmark, *chunk) for chunk in _chunks(counts[place] // GROUP[benchmark])]
            _write({folder / f"{place}.parquet": FEATURES[benchmark]}, work(_draw_benchmark, jobs), bar)
    draw_contact_sheet(folder, folder / "contact_sheet.png")
