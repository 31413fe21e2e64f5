"""`agevlm data import`: pictures, texts and masks of elsewhere to one data set that every stage trains on.

    DATA/captions/train-*.parquet, DATA/instructions/train-*.parquet   rows with a caption, rows with questions
    DATA/masks/PART.parquet, DATA/phrases/PART.parquet                 a mask for each row, and for each phrase
    DATA/contact_sheet.png, DATA/import.json                           to look at; all counts, all that was left out

Rows are read, checked and named as the conversion of published sets does it (`data/published/convert.py`).
"""

import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features

from agevlm.data.masks import MASKS, PHRASES
from agevlm.data.published.convert import check_rows, convert, identity_of
from agevlm.data.published.sources import open_source
from agevlm.data.rows import (
    IMAGE_PLACEHOLDER,
    MASK_FEATURES,
    MAX_PHRASES,
    PHRASE_FEATURES,
    ROW_FEATURES,
    undecoded,
)
from agevlm.data.scenes.contact_sheet import draw_entries, training_entry
from agevlm.data.tables import GroupWriter
from agevlm.progress import Bar, written
from agevlm.store import check_same, digest, new_folder, read_lines, read_table, replacing, write_json

from .annotations import files_of, read_annotations
from .joining import Joiner, path_of


FORMAT = 1  # raise when the same arguments would give other rows or masks
REPORT = "import.json"
PARTS = {"captions": "caption", "instructions": "question+answer"}  # and the texts that masks are for
SHEET, _SHARD, _SHOWN = "contact_sheet.png", "train-00000-of-00001", 6
# What asks for a caption, in LLaVA's and Cambrian's words
_DESCRIBE = re.compile(r"\b(?:descri\w+|caption|summar\w+|explanation|interpretation|account|narrat\w+)\b", re.I)


def import_data(
    source: str | Path,
    out: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    masks: Sequence[str | Path] = (),
    part: str | None = None,
    strict: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the folder `out`, or finds it done.

    Args:
        source, images: as `published.open_source` takes them.
        masks: see `read_annotations`.
        part: `captions` or `instructions` for all rows. Default: `part_of` each.
        strict: stop at a row that would be dropped and at a mask that guides no row, and leave nothing.

    Returns:
        What import.json holds.

    Raises:
        ValueError: no source, no masks, masks of which none guides a row, no good row, or `out` holds something else.
    """
    out = Path(out)
    for place in map(Path, (source, *masks)):
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"{out} lies in {place}, of which all files are read; choose a folder outside of it")
    opened = open_source(source, images, out)
    annotations = read_annotations(masks)
    identity = {"format": FORMAT, "part": part, "masks": _digest(masks), "source": identity_of(opened)}
    if out.exists() and any(out.iterdir()):
        report = read_table(out / REPORT)
        if "import" not in report:
            raise ValueError(f"{out} is not empty and holds no import; choose another folder")
        check_same(out, report["import"], identity, "import")
        for name in PARTS:
            for what, file in (("rows", f"{name}/{_SHARD}"), *((what, f"{what}/{name}") for what in (MASKS, PHRASES))):
                if report[what][name]:
                    check_rows([out / f"{file}.parquet"], report[what][name], out, "import")
        return report
    with new_folder(out) as work:
        rows = work / "rows"
        summary = convert(opened, rows, strict=strict, progress=progress)
        joiner = Joiner(annotations, _names(rows))
        counts, without = _write(rows, work, joiner, part, progress)
        unused = joiner.unused()
        if unused and (strict or len(unused) == len(annotations)):
            name, shown = next(_names(rows))
            raise ValueError(
                f"{len(unused)} of {len(annotations)} masks guide no row, such as {unused[0]['mask']}: "
                f"{unused[0]['reason']}. Correct or remove them; a row is named {name!r} and shows {shown!r}"
            )
        report = {
            "import": identity,
            "rows": {name: counts[name] for name in PARTS},
            **{what: {name: counts[what, name] for name in PARTS} for what in (MASKS, PHRASES)},
            "phrases_left_out": counts["left out"],
            "annotations": len(annotations),
            "unused_masks": unused,
            "rows_without_mask": without,
            "dropped_rows": read_lines(rows / "bad_rows.jsonl"),
            "repaired": summary["repaired"],
        }
        shutil.rmtree(rows)
        write_json(work / REPORT, report)
    return report


def import_masks(
    masks: Sequence[str | Path], rows: Dataset, out: Path, source: str = "caption", by_phrase: bool = False
) -> dict[str, int]:
    """Writes the masks of rows that are a data set already as one Parquet file.

    Args:
        masks: see `read_annotations`.
        source: texts that the masks are for, see `Joiner.guide`.
        by_phrase: a mask for each phrase, up to 8 a row, in place of one a row.

    Returns:
        the number of masks written, and of those given that guide no row by reason.

    Raises:
        ValueError: as `read_annotations`; none of them guides a row.
    """
    rows = undecoded(rows.select_columns(["id", "images", "messages"]))
    joiner = Joiner(read_annotations(masks), ((row["id"], path_of(row)) for row in rows))
    with (
        replacing(out) as temporary,
        GroupWriter(temporary, (PHRASE_FEATURES if by_phrase else MASK_FEATURES).arrow_schema) as writer,
    ):
        count = 0
        for row in Bar(rows, desc="masks", unit="row"):
            guided = joiner.guide(row, source)
            for mask in guided.phrases[:MAX_PHRASES] if by_phrase else filter(None, [guided.whole]):
                writer.add(mask)
                count += 1
        unused = Counter(item["reason"] for item in joiner.unused())
        if not count:
            raise ValueError(f"none of the masks guides a row; {', '.join(list(unused)[:_SHOWN])}")
    return {"written": count, **unused}


def part_of(messages: Sequence[Mapping[str, str]]) -> str:
    """The part a row belongs to: one answer to nothing, or to the wish for a description, is a caption."""
    turns = [message["content"] for message in messages if message["role"] != "system"]
    asked = turns[0].replace(IMAGE_PLACEHOLDER, "").strip()
    wished = not asked or (_DESCRIBE.search(asked) and not asked.endswith("?"))
    return "captions" if len(turns) == 2 and IMAGE_PLACEHOLDER in turns[0] and wished else "instructions"


def _digest(places: Sequence[str | Path]) -> str:
    """Of the masks by the names and bytes of their files."""
    files = (file for place in places for file in files_of(Path(place)))
    return digest((piece for path, name in files for piece in (name, path.read_bytes())), size=8)


def _read(rows: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for path in sorted(rows.glob("train-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16, columns=columns):
                yield from batch.to_pylist()


def _names(rows: Path) -> Iterator[tuple[str, str]]:
    """Id and path of the first picture of converted rows; the pictures are not read."""
    return ((row["id"], path_of(row)) for row in _read(rows, ["id", "images.list.element.path"]))


def _write(
    rows: Path, out: Path, joiner: Joiner, part: str | None, progress: bool
) -> tuple[Counter[Any], list[dict[str, str]]]:
    """Writes the rows with their masks by part, and the contact sheet; counts, and the rows without a mask."""
    counts: Counter[Any] = Counter()
    without, entries = [], {name: list[Any]() for name in PARTS}
    with ExitStack() as stack:
        writers: dict[str, GroupWriter] = {}

        def add(name: str, features: Features, row: Mapping[str, Any], size: int = 0) -> None:
            if name not in writers:  # a file without rows is none
                (out / name).parent.mkdir(exist_ok=True)
                writers[name] = stack.enter_context(GroupWriter(out / f"{name}.parquet", features.arrow_schema))
            writers[name].add(row, size)

        for row in Bar(_read(rows), desc="masks", unit="row", disable=not progress):
            name = part or part_of(row["messages"])
            guided = joiner.guide(row, PARTS[name])
            phrases = guided.phrases[:MAX_PHRASES]
            add(f"{name}/{_SHARD}", ROW_FEATURES, row, sum(len(image["bytes"]) for image in row["images"]))
            counts.update({name: 1, (PHRASES, name): len(phrases), "left out": len(guided.phrases) - len(phrases)})
            if guided.whole:
                counts[MASKS, name] += 1
                add(f"{MASKS}/{name}", MASK_FEATURES, guided.whole)
            else:
                without.append({"row": row["id"], "reason": guided.reason})
            for phrase in phrases:
                add(f"{PHRASES}/{name}", PHRASE_FEATURES, phrase)
            if row["images"] and len(entries[name]) < _SHOWN and (guided.whole or not joiner.annotations):
                entries[name].append(training_entry(row, [*filter(None, [guided.whole]), *phrases]))
    draw_entries([entry for name in PARTS for entry in entries[name]], out / SHEET)
    return counts, without


def print_report(report: Mapping[str, Any], out: Path) -> None:
    """The counts of an import, the first of what was left out, and what to do next."""
    for name, count in report["rows"].items():
        if count:
            masks, phrases = report[MASKS][name], report[PHRASES][name]
            print(f"{count:,} {name}: {masks:,} with a mask, {phrases:,} phrases with a mask of their own")
    for what, items, name in (
        ("rows dropped", report["dropped_rows"], "id"),
        (f"of {report['annotations']:,} masks guide no row", report["unused_masks"], "mask"),
        ("rows without a mask", report["rows_without_mask"] if report["annotations"] else [], "row"),
    ):
        if items:
            print(f"{len(items):,} {what}:")
            for item in items[:_SHOWN]:
                print(f"  {item[name] or item['row']}: {item.get('detail') or item['reason']}")
            if len(items) > _SHOWN:
                print("  ...")
    if report["phrases_left_out"]:
        print(f"{report['phrases_left_out']:,} phrases beyond {MAX_PHRASES} a row are left out")
    print(f"Look at {out / SHEET}; {out / REPORT} lists all that was left out")
    guided = [name for name in PARTS if report[MASKS][name]]
    stage = "stage3_ground" if "captions" in guided else "stage4_instruct --variant agevlm-lm"
    name = next(name for name in PARTS if report["rows"][name])
    query = "caption" if name == "captions" else "question"
    ground = f"agevlm ground {shlex.quote(str(out / name))} --query {query} --output {shlex.quote(str(out / MASKS))}"
    # The paper's recipe guides one row in thirty: of a few rows of one's own, none.
    train = f"agevlm train {stage} --data {{}} --mask-fraction 1 --init-from CHECKPOINT --output-dir RUN"
    written(out, train if guided else ground)
