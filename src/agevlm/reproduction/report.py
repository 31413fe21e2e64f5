"""The report of a run: one HTML file that needs nothing else, and the same as JSON.

What it says follows from `results.py`; this file turns files into inline pictures and logs into curves, and renders.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from agevlm.images import data_address, open_image
from agevlm.store import write_json, write_text

from .charts import Line, Point, line_chart
from .results import Example, Results, Run, Variant, claims, splits, summary, tables


PICTURE_SIDE, SECTION_SIDE = 448, 1000
TEMPLATE = "report.html.jinja"
_VERDICTS = {True: "holds", False: "does not hold", None: "undecided"}


def write_report(path_html: str | Path, path_json: str | Path, results: Results) -> None:
    """Writes both files.

    Args:
        results: see `results.Results`. Pictures of the examples are read from their files; the JSON names them
            relative to its own folder.

    Raises:
        ValueError: no variant, a variant without a run, or no split that all runs share.
        FileNotFoundError: a picture of an example is missing.
    """
    path_html, path_json = Path(path_html), Path(path_json)
    names = splits(results)
    found = results.get("findings") or claims(results)
    seeds = sorted({run["seed"] for variant in results["variants"] for run in variant["runs"]})
    by_split = {split: tables(results, split) for split in names}
    page = {
        "results": results,
        "commit": results.get("commit"),
        "summary": summary(found),
        "claims": [{**dataclasses.asdict(claim), "verdict": _VERDICTS[claim.holds]} for claim in found],
        "seeds": seeds,
        "settings": {"seeds": ", ".join(map(str, seeds)), **results["settings"]},
        "splits": names,
        "tables": by_split,
        "charts": charts(results),
        "classes": {variant["title"]: _css_class(index) for index, variant in enumerate(results["variants"])},
        "examples": [_inline(example) for example in results["examples"]],
        "sections": [
            {**section, "images": [data_uri(image, SECTION_SIDE) for image in section["images"]]}
            for section in results.get("sections", [])
        ],
        "total_seconds": sum(results["seconds"].values()),
    }
    environment = Environment(
        loader=PackageLoader("agevlm.reproduction"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["duration"] = duration
    write_text(path_html, environment.get_template(TEMPLATE).render(page))
    data = {
        **results,
        "findings": page["claims"] if "findings" in results else [],
        "sections": [
            {**section, "images": [_beside(image, path_json.parent) for image in section["images"]]}
            for section in results.get("sections", [])
        ],
        "examples": [_relative(example, path_json.parent) for example in results["examples"]],
        "summary": page["summary"],
        "claims": page["claims"],
        "tables": {split: [dataclasses.asdict(table) for table in made] for split, made in by_split.items()},
    }
    write_json(path_json, data, indent=1)


def charts(results: Results) -> list[dict[str, Any]]:
    """{title, svg} of the losses and the in-mask mass over the optimizer steps of all stages."""
    drawn = []
    for title, read, percent in (
        ("Language-model loss", language_model_loss, False),
        ("Guidance loss (Eq. 3)", lambda entry, _: entry.get("guidance_loss"), False),
        ("Attention inside the mask", lambda entry, _: entry.get("in_mask_mass"), True),
    ):
        lines = [
            Line(variant["title"], _css_class(index), [timeline(run, read) for run in variant["runs"]])
            for index, variant in enumerate(results["variants"])
        ]
        if any(line.statistics for line in lines):
            svg = line_chart(title, lines, _stage_starts(results["variants"]), percent)
            drawn.append({"title": title, "svg": svg})
    return drawn


def language_model_loss(entry: Mapping[str, Any], guidance_weight: float) -> float | None:
    """The logged `loss` without its guidance term, so that guided and unguided variants compare."""
    if "loss" not in entry:
        return None
    return entry["loss"] - guidance_weight * entry.get("guidance_loss", 0.0)


def timeline(run: Run, read: Callable[[Mapping[str, Any], float], float | None]) -> list[Point]:
    """(step, value) over all stages of a run, each stage's steps counted on from the last one's."""
    points, start = [], 0
    for stage in run["stages"]:
        for entry in stage["log"]:
            value = read(entry, stage["guidance_weight"])
            if value is not None:
                points.append((start + entry["step"], float(value)))
        start += _length(stage)
    return points


def _length(stage: Mapping[str, Any]) -> int:
    return max((entry["step"] for entry in stage["log"]), default=0)


def _stage_starts(variants: list[Variant]) -> dict[str, float]:
    starts, start = {}, 0
    for stage in variants[0]["runs"][0]["stages"]:
        starts[stage["name"]] = float(start)
        start += _length(stage)
    return starts


def _css_class(index: int) -> str:
    return f"v{index}"


def duration(seconds: float) -> str:
    """ "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _inline(example: Example) -> dict[str, Any]:
    return {
        **example,
        "image": data_uri(example["image"]),
        "panels": [{**panel, "overlay": data_uri(panel["overlay"])} for panel in example["panels"]],
    }


def data_uri(path: str | Path, side: int = PICTURE_SIDE) -> str:
    """The picture as a WebP data URL of at most `side` pixels a side."""
    return data_address(open_image(path, str(path)), "webp", 82, side)


def _relative(example: Example, folder: Path) -> dict[str, Any]:
    panels = [{**panel, "overlay": _beside(panel["overlay"], folder)} for panel in example["panels"]]
    return {**example, "image": _beside(example["image"], folder), "panels": panels}


def _beside(path: str, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()
