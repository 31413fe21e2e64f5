"""The output of a run: a `datasets` folder of masks kept and rejected, its card, and `summary.json`; and COCO's files.

`load_dataset(OUT, split="kept")` has the columns that `data/masks.py` joins (id, query, message_index, mask, source,
score) and the measurements of each mask. Rejected rows have the reason, and their mask if there was one.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from jinja2 import Environment, PackageLoader, select_autoescape

from agevlm.data.masks import OCCURRENCE
from agevlm.data.rows import MASK_FEATURES, undecoded
from agevlm.data.tables import read_files
from agevlm.progress import Bar
from agevlm.store import replacing, write_json, write_text

from .filters import KEPT, NOT_NEEDED, Filters
from .journal import Journals
from .masks import mask_box, read_mask, to_rle
from .regions import GROUNDED


# What a run measures, in its journal. `outcome` is GROUNDED or a failure.
JOURNAL_FEATURES = Features(
    {
        "index": Value("int64"),
        "id": Value("string"),
        "query": Value("string"),
        "text": Value("string"),
        "message_index": Value("int32"),
        "mask": MASK_FEATURES["mask"],
        "boxes": List(List(Value("float32"), length=4)),
        "polygons": List(List(Value("float32"))),
        "score": Value("float32"),
        "area": Value("float32"),
        "grid_cells": Value("int32"),
        "outcome": Value("string"),
        "detail": Value("string"),
    }
)
OUTPUT_FEATURES = Features(
    {
        **MASK_FEATURES,
        "query_source": Value("string"),
        **{name: JOURNAL_FEATURES[name] for name in ("text", "boxes", "polygons", "area", "grid_cells")},
        "status": Value("string"),
        "detail": Value("string"),
        "backend": Value("string"),
        "revisions": List({"model": Value("string"), "commit": Value("string")}),
    }
)
SPLITS = ("kept", "rejected")
SUMMARY = "summary.json"


def schema_of(features: Features, by_phrase: bool) -> pa.Schema:
    """The columns, and `occurrence` where each phrase has a row."""
    return Features({**features, OCCURRENCE: Value("int32")} if by_phrase else features).arrow_schema


def write_output(out: Path, journals: Journals, manifest: Mapping[str, Any], filters: Filters) -> dict[str, Any]:
    """Writes the folder out of the journals of a finished run; the summary comes last and marks it as complete."""
    (out / SUMMARY).unlink(missing_ok=True)
    statuses = _statuses(journals, filters)
    by_index = dict(zip(journals.column("index").tolist(), statuses, strict=True))
    constant = {
        "query_source": manifest["query_source"],
        "source": manifest["backend"],
        "backend": manifest["backend"],
        "revisions": [{"model": name, "commit": commit} for name, commit in manifest["revisions"].items()],
    }
    (out / "data").mkdir(exist_ok=True)
    schema = schema_of(OUTPUT_FEATURES, "by_phrase" in manifest)
    files = {split: out / "data" / f"{split}.parquet" for split in SPLITS}
    with ExitStack() as stack:
        parts = {split: stack.enter_context(replacing(path)) for split, path in files.items()}
        writers = {split: stack.enter_context(pq.ParquetWriter(path, schema)) for split, path in parts.items()}
        for table in journals.tables():
            found = [by_index[index] for index in table.column("index").to_pylist()]
            full = _with_columns(table, {**constant, "status": found}, schema)
            kept = np.array([status == KEPT for status in found])
            for split, chosen in (("kept", kept), ("rejected", ~kept)):
                if chosen.any():
                    writers[split].write_table(full.filter(pa.array(chosen)))
    summary = _summary(journals, statuses, manifest, filters)
    write_text(out / "README.md", card(summary))
    write_json(out / SUMMARY, summary)
    return summary


def _statuses(journals: Journals, filters: Filters) -> list[str]:
    """The status of every row, in the order of the files (a copied row has the same one twice)."""
    names = ("id", "outcome", "area", "score", "grid_cells")
    ids, *measured = (journals.data.column(name).to_pylist() for name in names)
    statuses = [filters.status(*row) for row in zip(*measured, strict=True)]
    over = filters.beyond_quota({row_id for row_id, status in zip(ids, statuses, strict=True) if status == KEPT})
    return [NOT_NEEDED if row_id in over else status for row_id, status in zip(ids, statuses, strict=True)]


def _with_columns(table: pa.Table, more: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """The output's columns: a list is a column of that length, anything else is repeated."""
    columns = []
    for field in schema:
        if field.name in more:
            value = more[field.name]
            values = value if field.name == "status" else [value] * len(table)
            columns.append(pa.array(values, field.type))
        else:
            columns.append(table.column(field.name).combine_chunks().cast(field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _summary(journals: Journals, statuses: list[str], manifest: Mapping[str, Any], filters: Filters) -> dict[str, Any]:
    counts, ids = Counter(statuses), journals.column("id")
    kept = np.array([status == KEPT for status in statuses], dtype=bool)
    areas, scores = journals.column("area").astype(float), journals.column("score").astype(float)
    grounded = journals.column("outcome").astype(object) == GROUNDED

    def mean(values: np.ndarray) -> float | None:
        values = values[kept]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None

    return {
        **manifest,
        "attempted": len({*ids}),
        "grounded": int(grounded.sum()),
        "boxes_left_out": int((grounded & (journals.column("detail").astype(object) != "")).sum()),
        "kept": counts[KEPT],
        "kept_rows": len({*ids[kept]}),
        "status": dict(sorted(counts.items())),
        "mean_score": mean(scores),
        "mean_area": mean(areas),
        "filters": vars(filters),
    }


def card(summary: Mapping[str, Any]) -> str:
    """The data set's card: where the files are, how the masks came about, how many there are, why others are not."""
    # `datasets` refuses splits without rows.
    masks = {"kept": summary["kept"], "rejected": sum(summary["status"].values()) - summary["kept"]}
    splits = [split for split in SPLITS if masks[split]]
    thresholds = ", ".join(f"{name} {value}" for name, value in summary["filters"].items() if value is not None)
    return environment().get_template("card.md.jinja").render(**summary, splits=splits, thresholds=thresholds)


def environment() -> Environment:
    """The templates of this folder. Pages are escaped, cards in Markdown are not."""
    escaped = select_autoescape(["html.jinja"])
    loader = PackageLoader("agevlm.grounding", "templates")
    return Environment(loader=loader, autoescape=escaped, trim_blocks=True, keep_trailing_newline=True)


def read_masks(path: Path | str, split: str = "kept") -> Dataset:
    """The masks of a run's folder.

    Raises:
        ValueError: the folder holds no complete run.
    """
    path = Path(path)
    if not (path / SUMMARY).is_file():
        raise ValueError(f"{path} holds no complete run of `agevlm ground`; run the same command again to complete it")
    file = path / "data" / f"{split}.parquet"
    if pq.read_metadata(file).num_rows == 0:  # which `datasets` takes for a mistake
        return Dataset(pq.read_schema(file).empty_table())
    return read_files([file])


def write_coco(masks: Dataset, path: Path) -> int:
    """Writes one COCO annotation for every mask (extra `coco`); returns how many. The row's id is the picture's
    `file_name`, and a phrase is a category; `annotations.py` reads them."""
    images: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    annotations: list[dict[str, Any]] = []
    for row in Bar(undecoded(masks), desc="export", unit="mask"):
        if row["mask"] is None:
            continue
        mask = read_mask(row["mask"], row["id"])
        image = {"id": len(images) + 1, "file_name": row["id"], "height": mask.shape[0], "width": mask.shape[1]}
        name = row["query"] if OCCURRENCE in row else "region"
        left, top, right, bottom = mask_box(mask) or (0.0, 0.0, 0.0, 0.0)
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": images.setdefault(row["id"], image)["id"],
                "category_id": numbers.setdefault(name, len(numbers) + 1),
                "segmentation": to_rle(mask),
                "bbox": [left, top, right - left, bottom - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                **{name: row[name] for name in ("query", "message_index", OCCURRENCE, "score") if name in row},
            }
        )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    content = {"images": [*images.values()], "annotations": annotations, "categories": categories}
    write_json(path, content, indent=None)
    return len(annotations)
