"""The verbs `ground`, `ground view`, ... (paper sections 3.2.2 and appendix A): their parsers and what they print."""

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from agevlm.arguments import VerbParser, note_old
from agevlm.progress import written

from .choices import QUERY_SOURCES, names
from .filters import Filters


def ground(argv: list[str] | None = None) -> None:
    """Make masks from texts: Florence-2 + SAM and others.

    agevlm ground DATASET --output OUT --backend florence2+sam2 --query caption --keep 77000
    agevlm ground DATASET --output DATASET/phrases --backend florence2-phrases+sam2 --by-phrase
    agevlm ground view OUT                       # a page to judge the masks by eye
    agevlm ground quality OUT --against MASKS    # IoU, boundary F and grid IoU against exact masks
    agevlm ground export OUT --output coco.json  # COCO annotations with run lengths

    The same command resumes an interrupted run; with other filters it only writes the output again. Several
    processes or nodes: accelerate launch -m agevlm ground DATASET ...
    """
    default = Filters()
    parser = VerbParser("ground", ground.__doc__)
    parser.add_argument("dataset", help="rows: a Parquet file, a folder of them or of save_to_disk, or a repository")
    parser.add_output("folder to write, or of an unfinished run")
    parser.add_argument("--backend", choices=names(), default="florence2+sam2", help="default: %(default)s")
    parser.add_argument("--query", choices=QUERY_SOURCES, default="caption", help="text to ground (default: caption)")
    parser.add_argument("--by-phrase", action="store_true", help="a mask for each phrase of a text, up to 8")
    parser.add_argument("--split", help="of the data set (default: train)")
    parser.add_argument(
        "--grounder", help="repository or folder instead of the backend's Florence-2 or Grounding DINO"
    )
    parser.add_argument("--grounder-revision", help="its branch, tag or commit")
    parser.add_argument("--segmenter", help="repository or folder instead of the default SAM")
    parser.add_argument("--segmenter-revision", help="its branch, tag or commit")
    parser.add_argument("--masks", help="exact: data set with id and mask (default: the rows' own guidance)")
    _add_model(parser, "decides which masks are empty")
    parser.add_argument("--attempt", type=int, help="try this many rows, chosen by a hash of the id (default: all)")
    parser.add_argument(
        "--keep", type=int, help="keep masks of at most this many rows; the paper: 77000 captions, 150000 questions"
    )
    parser.add_argument("--min-area", type=float, default=default.min_area, help="share of the picture (%(default)s)")
    parser.add_argument("--max-area", type=float, default=default.max_area, help="share of the picture (%(default)s)")
    parser.add_argument("--min-score", type=float, default=default.min_score, help="segmenter's score (%(default)s)")
    parser.add_argument("--min-cells", type=int, default=default.min_cells, help="cells of the grid (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of Florence-2's answer (%(default)s)")
    parser.rename("--num-workers", "--workers")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode ahead (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at a row that cannot be used")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"`--batch-size` must be at least 1, got {options.batch_size}.")

    import torch
    from accelerate import PartialState

    from agevlm.data.rows import content_digest
    from agevlm.data.tables import load_table
    from agevlm.grounding.backends import PHRASE, Exact, load_backend
    from agevlm.grounding.runner import ground as make_masks

    # A process waits for the slowest at the end; the default limit of half an hour would end the run instead. Without
    # `cpu` accelerate does not look for other processes on a machine that has no accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=datetime.timedelta(days=30))
    with state.main_process_first():  # one writes the cache, the others find it
        rows = load_table(options.dataset, options.split)

    of_models = ("grounder", "grounder_revision", "segmenter", "segmenter_revision", "max_new_tokens")
    parts = {name: getattr(options, name) for name in of_models}
    settings = {**parts, "grounder": _weights(options.grounder), "segmenter": _weights(options.segmenter)}
    if options.backend == "exact":
        masks = load_table(options.masks) if options.masks else rows
        columns = ["id", "mask", "guidance", *(PHRASE if options.by_phrase else ())]
        settings = {"masks": content_digest(masks, columns)}

    def make_backend() -> Any:
        if options.backend == "exact":
            return Exact.of(masks)
        return load_backend(options.backend, **parts, device=state.device)

    summary = make_masks(
        rows,
        options.output,
        make_backend,
        backend_name=options.backend,
        grid=_grid(options.model),
        dataset_name=options.dataset,
        query_source=options.query,
        by_phrase=options.by_phrase,
        filters=Filters(
            options.min_area, options.max_area, options.min_score, options.min_cells, options.keep, options.seed
        ),
        attempt=options.attempt,
        batch_size=options.batch_size,
        num_workers=options.workers,
        strict=options.strict,
        settings=settings,
    )
    if summary is not None:
        reasons = ", ".join(f"{name} {count:,}" for name, count in summary["status"].items())
        print(f"{summary['kept']:,} masks kept of {summary['attempted']:,} rows attempted ({reasons})")
        if options.keep is not None and summary["kept_rows"] < options.keep:
            print(f"{options.keep - summary['kept_rows']:,} fewer than asked for: raise --attempt", file=sys.stderr)
        written(options.output, "agevlm ground view {}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _weights(name: str | None) -> str | None:
    """Identity of a model: the fingerprint of a folder's weights, else its name."""
    from agevlm.hub_cards import weights_fingerprint

    return weights_fingerprint(name) if name is not None and Path(name).is_dir() else name


def _grid(checkpoint: str | None) -> Any:
    """The image processor of a checkpoint, or the paper's: 768 pixels, padded, 24 x 24 cells."""
    from agevlm.models import load_processor
    from agevlm.processing import AgeVlmImageProcessorPil

    return load_processor(checkpoint, ours=True).image_processor if checkpoint else AgeVlmImageProcessorPil()


def view(argv: list[str] | None = None) -> None:
    """Make a page of pictures with their masks."""
    parser = VerbParser("ground view", view.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--dataset", help="its rows, where they are now (default: as in the run)")
    parser.add_argument("--split", help="of the data set")
    parser.add_argument("--count", type=int, default=100, help="rows of each split, by a hash (%(default)s)")
    _add_model(parser, "is shown")
    parser.add_argument("--output", type=Path, help="page to write (default: view.html in the folder)")
    options = parser.parse_args(argv)

    from agevlm.data.tables import load_table
    from agevlm.grounding.output import SUMMARY
    from agevlm.grounding.view import write_view
    from agevlm.store import read_json

    name = options.dataset
    if name is None and (options.run / SUMMARY).is_file():
        name = read_json(options.run / SUMMARY)["dataset"]
    output = options.output or options.run / "view.html"
    count = write_view(
        options.run, load_table(name, options.split) if name else None, output, _grid(options.model), options.count
    )
    print(f"{count} rows")
    written(output, f"agevlm train stage3_ground --data DATA --masks {shlex.quote(str(options.run))}")


def quality(argv: list[str] | None = None) -> None:
    """Compare masks with exact masks: IoU, boundary F, grid IoU."""
    parser = VerbParser("ground quality", quality.__doc__)
    parser.add_argument("masks", help="folder of a run, or a data set with id and mask")
    parser.add_argument("--against", required=True, help="the exact ones: likewise")
    _add_model(parser, "is compared")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)

    from agevlm.grounding.quality import load_masks, measure_quality
    from agevlm.store import write_text

    result = measure_quality(load_masks(options.masks), load_masks(options.against), _grid(options.model))
    text = json.dumps(result, indent=2)
    if options.output:
        write_text(options.output, text + "\n")
    print(text)


def export_coco(argv: list[str] | None = None) -> None:
    """Write kept masks as COCO annotations."""
    parser = VerbParser("ground export", export_coco.__doc__)
    parser.add_argument("masks", help="folder of a run, or a data set with id and mask")
    parser.add_output("JSON file to write", "FILE")
    options = parser.parse_args(argv)

    from agevlm.grounding.coco import write_coco
    from agevlm.grounding.quality import load_masks

    print(f"{write_coco(load_masks(options.masks), options.output)} annotations")
    written(options.output)


def import_coco(argv: list[str] | None = None) -> None:
    """Old spelling of `agevlm data import`, for rows that are a data set already: writes their masks alone.

    agevlm ground import coco.json --rows mydata --output MASKS.parquet
    """
    parser = VerbParser("ground import", import_coco.__doc__)
    parser.add_argument("coco", type=Path, help="what `agevlm data import` takes as --masks")
    parser.add_argument("--rows", help="data set that shows the pictures (required)")
    parser.add_argument("--query", choices=QUERY_SOURCES, default="caption", help="text of a row (default: caption)")
    parser.add_argument("--by-phrase", action="store_true", help="a mask for each thing that a text names, up to 8")
    parser.add_output("Parquet file to write", "FILE")
    options = parser.parse_args(argv)
    note_old("`agevlm ground import`", "`agevlm data import`")
    if options.rows is None:
        raise ValueError(f"{options.coco} has no texts for its masks: give the rows that they belong to, --rows ROWS")

    from agevlm.data.rows import ROW_FEATURES
    from agevlm.data.tables import check_columns, load_table
    from agevlm.grounding.import_data import import_masks

    rows = load_table(options.rows)
    check_columns(options.rows, rows.column_names, ROW_FEATURES)
    found = import_masks([options.coco], rows, options.output, options.query, options.by_phrase)
    print(f"{found.pop('written')} masks")
    for reason, count in found.items():
        print(f"{count} masks guide no row: {reason}", file=sys.stderr)
    written(options.output, "agevlm train stage3_ground --data DATA --masks {}")


def import_data(argv: list[str] | None = None) -> None:
    """Make a data set of your own pictures, texts and masks that every stage trains on.

    agevlm data import rows.json --images PHOTOS --masks coco.json --output DATA
    agevlm data import PHOTOS --masks MASKS --output DATA

    SOURCE is one of
      rows.json, rows.jsonl   LLaVA's {id, image, conversations}, or {images, messages}; the Hub's and Parquet too
      rows.csv                the columns image and caption, or image, question and answer; id if you like
      PHOTOS                  a folder with NAME.txt (the caption) beside NAME.jpg, or with metadata.csv or
                              metadata.jsonl (file_name and text)
    --masks takes files and folders of
      COCO's JSON             run lengths, polygons, or boxes alone
      LabelMe's JSON          polygons, rectangles, circles, masks
      PNG pictures            NAME.png for NAME.jpg, 0/1, 0/255, class numbers, palette or alpha; one object each:
                              NAME_1.png, NAME_dog.png, NAME_dog_1.png, NAME/1.png or NAME/dog.png
      boxes.csv               image, label, xmin, ymin, xmax, ymax (right and bottom excluded)
    A mask finds its rows by the picture's name, a path or the end of one, or by the row's id.

    A row with one description goes to DATA/captions, a row with questions to DATA/instructions. A caption is guided
    to all masks of its picture (DATA/masks). Of the questions, the first that names a labeled thing is guided to what
    it and its answer name; masks without labels guide the first question. Each label that a text names, in singular or
    plural, is a phrase with a mask of its own (DATA/phrases, for --variant agevlm-phrases). DATA/contact_sheet.png
    shows them. DATA/import.json lists each row that was dropped or has no mask, and each mask that guides no row, with
    the reason.

    The same command again finds a finished DATA and changes nothing.
    """
    parser = VerbParser("data import", import_data.__doc__)
    parser.add_argument("source", help="pictures with their texts, see above")
    parser.add_argument("--images", nargs="+", metavar="ROOT", help="folders of the pictures (default: beside SOURCE)")
    parser.add_argument("--masks", nargs="+", default=(), metavar="PLACE", help="masks, see above (default: none)")
    parser.add_argument("--part", choices=("captions", "instructions"), help="of all rows (default: told by each)")
    parser.add_argument(
        "--strict", action="store_true", help="stop at a row that cannot be used or a mask that guides no row"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DATA", help="folder to write (required)")
    options = vars(parser.parse_args(argv))

    from .import_data import import_data as make
    from .import_data import print_report

    out = options.pop("output")
    print_report(make(options.pop("source"), out, **options), out)


def _add_model(parser: VerbParser, purpose: str) -> None:
    parser.add_argument("--model", help=f"checkpoint whose grid {purpose} (default: 768, pad)")
    parser.rename("--processor", "--model")
