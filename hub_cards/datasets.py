"""Cards of data sets: grounded scenes (`agevlm data scenes`) and guidance masks, from the files in their folder.

The metadata names every parquet file as a configuration, so that `load_dataset(REPO, "captions")` works on what is
uploaded. Counts come from the files, not from what was asked for.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from agevlm.store import read_table, write_text


TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
MANIFEST = "scenes.json"
MASK_COLUMNS = {"id", "query", "message_index", "mask", "source", "score"}


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a data set and no model."""
    return not (folder / "config.json").is_file() and any(folder.glob("**/*.parquet"))


def describe(folder: Path) -> list[dict[str, Any]]:
    """For each configuration: `name`, `split`, `paths` of its parquet files, `rows`, and of masks their `sources`.

    `captions/train.parquet` is the configuration `captions` (in shards: `captions/train-00000-of-00002.parquet`),
    `masks/captions.parquet` is `masks_captions`, and `benchmarks/name/pope.parquet` is `name_pope`.
    """
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("**/*.parquet")):
        file = pq.ParquetFile(path)
        *above, last = path.relative_to(folder).with_suffix("").parts
        last = re.sub(r"-\d+-of-\d+$", "", last)
        names = [name for name in (*above, last) if name not in ("benchmarks", "train")]
        name, split = "_".join(names) or "default", "test" if above[:1] == ["benchmarks"] else "train"
        part = parts.setdefault((name, split), {"name": name, "split": split, "paths": [], "rows": 0})
        part["paths"].append(path.relative_to(folder).as_posix())
        part["rows"] += file.metadata.num_rows
        if set(file.schema_arrow.names) >= MASK_COLUMNS:
            sources = part.setdefault("sources", Counter())
            sources.update(file.read(columns=["source"])["source"].to_pylist())
    return list(parts.values())


def render_dataset_card(folder: Path) -> DatasetCard:
    """The card of a folder of scenes, masks or other rows in parquet files.

    Raises:
        ValueError: `scenes.json` is damaged.
    """
    parts = describe(folder)
    manifest = read_table(folder / MANIFEST)
    kind = "scenes" if manifest else "masks" if all("sources" in part for part in parts) else "rows"
    card_data = DatasetCardData(
        language="en",
        pretty_name={"scenes": "Grounded scenes", "masks": "Guidance masks", "rows": "Rows of AGE-VLM"}[kind],
        task_categories=["visual-question-answering", "image-to-text"] if kind != "masks" else ["mask-generation"],
        tags=["agevlm", "visual-grounding", *(["synthetic"] if kind == "scenes" else [])],
        size_categories=_size(sum(part["rows"] for part in parts)),
        configs=[
            {"config_name": part["name"], "data_files": [{"split": part["split"], "path": part["paths"]}]}
            for part in parts
        ],
    )
    arguments = manifest.get("arguments", {})
    settings = {key: value for key, value in arguments.items() if isinstance(value, int | float)}
    return DatasetCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        kind=kind,
        title=card_data.pretty_name,
        parts=parts,
        source=manifest.get("source", {}).get("kind"),
        settings=settings,
        names=arguments.get("names") or [],
        picture="contact_sheet.png" if (folder / "contact_sheet.png").is_file() else None,
    )


def _size(rows: int) -> str:
    """The Hub's words for a number of rows."""
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in limits if rows < limit), "1M<n<10M" if rows < 10_000_000 else "10M<n<100M")


def write_dataset_card(folder: Path) -> Path:
    """Render the card of `folder` as README.md (replaced in one step) and return its path.

    Raises:
        ValueError: see `render_dataset_card`.
    """
    write_text(folder / "README.md", str(render_dataset_card(folder)))
    return folder / "README.md"
