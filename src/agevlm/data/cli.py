"""The verbs of `agevlm data`: their parsers. What they do is imported once the arguments are parsed."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_type_hints

from agevlm.arguments import VerbParser
from agevlm.progress import written

from .published.defaults import MAX_LENGTH, ROWS_PER_SHARD
from .scenes.arguments import SPLITS, SceneArguments


def scenes(argv: list[str] | None = None) -> None:
    """Compose grounded scenes: pictures, questions, exact masks, benchmarks.

    agevlm data scenes --output scenes
    """
    parser = VerbParser("data scenes", scenes.__doc__)
    parser.add_output("folder to write; a finished one of the same arguments is kept")
    special: dict[str, dict[str, Any]] = {
        "cutouts": {"type": Path},
        "backgrounds": {"type": Path},
        "names": {"nargs": "+"},
        "colors": {"nargs": "+"},
        "splits": {"nargs": "+", "choices": SPLITS},
    }
    for name, hint in get_type_hints(SceneArguments, include_extras=True).items():
        value, (told,) = getattr(SceneArguments, name), hint.__metadata__
        told += "" if value is None else f" (default: {'all' if value is SPLITS else value})"
        kind = special.get(name, {"type": type(value)})
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, help=told, **kind)
    _add_workers(parser)
    parser.rename("--num-proc", "--workers")
    parser.rename("--colours", "--colors")
    options = vars(parser.parse_args(argv))

    from .scenes.build import build_scenes

    out = build_scenes(options.pop("output"), num_proc=options.pop("workers"), **options)
    print(f"look at {out / 'contact_sheet.png'}")
    written(out, "agevlm train stage3_ground --size tiny --data {} --init-from CHECKPOINT")


def cutouts(argv: list[str] | None = None) -> None:
    """Fetch pictures of named objects to compose scenes of.

    agevlm data cutouts --output cutouts
    """
    parser = VerbParser("data cutouts", cutouts.__doc__)
    parser.add_output("new folder to write")
    parser.add_argument("--downloads", help="folder that keeps the downloaded archives")
    options = parser.parse_args(argv)

    from .scenes.fetch_cutouts import fetch_cutouts

    listing = fetch_cutouts(options.output, options.downloads)
    styles = sorted({entry["style"] for entry in listing})
    counts = ", ".join(f"{sum(entry['style'] == style for entry in listing)} {style}" for style in styles)
    print(f"{len({entry['name'] for entry in listing})} names ({counts})")
    written(options.output, "agevlm data scenes --cutouts {} --output scenes")


def photographs(argv: list[str] | None = None) -> None:
    """Fetch photographs of animals with questions: an unseen domain for models of cut-outs.

    agevlm data photographs --cutouts cutouts --foreground --output photographs
    """
    parser = VerbParser("data photographs", photographs.__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="new folder to write")
    parser.add_argument("--downloads", type=Path, help="folder that keeps the downloaded archives")
    parser.add_argument("--cutouts", type=Path, help="folder of `agevlm data cutouts`: tells its training names apart")
    parser.add_argument("--scenes", type=Path, help="scenes of these cut-outs: training names are theirs alone")
    parser.add_argument(
        "--foreground",
        action="store_true",
        help="measure looking too, on the foreground of each photograph, whatever it shows (downloads ISNet, AGPL-3; "
        "needs onnxruntime)",
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the absent names (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.scenes is not None and options.cutouts is None:
        parser.error("--scenes are made of cut-outs; give --cutouts too")

    from .scenes.fetch_photographs import fetch_photographs

    entries, questions = fetch_photographs(**vars(options))
    masks = f", {sum('mask' in entry for entry in entries)} with a foreground" if options.foreground else ""
    print(f"{len(entries)} photographs of {len({entry['name'] for entry in entries})} names{masks}")
    for field, rows in (("category", questions), ("license", entries)):
        counts = sorted(Counter(row[field] for row in rows).items())
        print(f"{field}: " + "; ".join(f"{count} {value}" for value, count in counts))
    print(f"look at {options.output / 'contact_sheet.png'}")
    written(options.output, "agevlm eval CHECKPOINT --data {}/questions.jsonl --output evaluation")


def cambrian(argv: list[str] | None = None) -> None:
    """Convert Cambrian, or any LLaVA-style JSON, to Parquet shards that training streams.

    agevlm data cambrian Cambrian-Alignment/jsons/alignment_2.5m.jsonl --output cambrian/captions

    The same command goes on where it was interrupted.
    """
    parser = VerbParser("data cambrian", cambrian.__doc__)
    _add_source(parser)
    parser.add_output("folder to write; it appears when all is done")
    parser.add_argument("--limit", type=int, help="convert the first LIMIT rows only")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row and leave nothing")
    parser.add_argument(
        "--rows-per-shard",
        type=int,
        default=ROWS_PER_SHARD,
        help="rows of the source per shard (default: %(default)s)",
    )
    options = vars(parser.parse_args(argv))

    from .published.convert import convert
    from .published.records import DROPPED, REPAIRED

    out = options.pop("output")
    summary = convert(options.pop("source"), out, **options)
    dropped = sum(summary["dropped"].values())
    print(f"{summary['rows']:,} rows with {summary['pictures']:,} pictures; {dropped:,} dropped")
    for what in ("dropped", "repaired"):
        for kind, count in sorted(summary[what].items(), key=lambda item: -item[1]):
            print(f"  {what} {count:>10,}  {kind}: {(DROPPED | REPAIRED)[kind]}")
    written(out, "agevlm train stage1_align --data {} --init-from START")


def check(argv: list[str] | None = None) -> None:
    """Report what is wrong with a training set, before it costs time on a GPU.

    agevlm data check llava/llava_v1_5_mix665k.json --model CHECKPOINT --against benchmarks --strict

    Ends with status 1 under `--strict` if there is a problem.
    """
    parser = VerbParser("data check", check.__doc__)
    _add_source(parser)
    parser.add_argument(
        "--against", nargs="+", default=(), metavar="FOLDER", help="evaluation sets, as pictures or Parquet files"
    )
    parser.add_argument("--model", help="folder or repository whose tokenizer counts tokens")
    parser.rename("--checkpoint", "--model")
    parser.add_argument(
        "--max-length", type=int, default=MAX_LENGTH, help="tokens a row may have (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="examine the first LIMIT rows only")
    parser.add_argument(
        "--output", type=Path, help="new folder for report.json and rows.jsonl, which lists all findings"
    )
    parser.rename("--out", "--output")
    parser.add_argument("--strict", action="store_true", help="end with status 1 if a row is dropped or a problem")
    options = vars(parser.parse_args(argv))

    from rich.console import Console

    from .published.check import check as examine
    from .published.check import print_report

    strict, out, checkpoint = (options.pop(name) for name in ("strict", "output", "model"))
    report = examine(options.pop("source"), out=out, checkpoint=checkpoint, **options)
    print_report(report, Console(markup=False))
    if strict and report["problems"]:
        sys.exit(1)


def _add_source(parser: VerbParser) -> None:
    """A published data set and its pictures."""
    parser.add_argument(
        "source", help=".jsonl, .json or .csv file, a folder with one, Parquet files, or a data set of the Hub"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="ROOT",
        help="folders and tar archives of the pictures (default: beside the JSON file)",
    )
    _add_workers(parser)


def _add_workers(parser: VerbParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
