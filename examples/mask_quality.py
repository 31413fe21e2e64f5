"""How good must masks be? Stage 3 at the tiny size on masks made worse on purpose, and on fewer (section 3.2.2).

    agevlm reproduce --size tiny --only main --seeds 0 1 2 --output runs/tiny   # stage 2 of every seed, and the scenes
    python examples/mask_quality.py runs/tiny runs/mask-quality --seeds 0 1 2

Every configuration (corruption, share of the rows that bring a mask, seed) is one run of stage 3 from that seed's
stage 2, on its captions and with its recipe. Then the model is asked the presence questions of unseen scenes: whether
it answers right, and how much of its attention is on the thing asked about. `--stage4` trains stage 4 behind each,
because stage 3 reads captions and has never answered a question; answers before that say little.

Corruptions are `kind:amount` (`agevlm.grounding.corrupt`). A row's corrupted mask does not depend on the share, and
larger shares contain smaller ones. Finished configurations are in OUT/results and are not run again; an unfinished one
goes on from its last checkpoint. OUT/mask_quality.png and OUT/mask_quality.md show all there are.
"""

import argparse
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset
from rich.console import Console
from transformers.utils import logging

from agevlm.data.masks import join_masks
from agevlm.data.rows import MASK_FEATURES
from agevlm.evaluation.run import evaluate_scenes
from agevlm.grounding.corrupt import corrupt
from agevlm.grounding.masks import to_png
from agevlm.grounding.quality import METRICS, compare
from agevlm.images import open_image
from agevlm.models import load, load_processor
from agevlm.store import write_json, write_text
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage3_ground, stage4_instruct


SPLIT, PRESENCE = "composition", "pope"
CORRUPTIONS = ("none", "erode:0.2", "dilate:0.4", "shift:0.5", "swap:0.5", "drop:0.5", "random:0.5", "random:1")
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
COMPARED = 300  # masks on which a corruption is measured
LABELS = {"mass": "attention inside the mask", "pointing": "points into the mask", "presence": "presence accuracy"}


def corrupted_masks(masks: Dataset, corruption: str, seed: int, grid: Any) -> tuple[Dataset, dict[str, float]]:
    """The masks of a scenes folder after a corruption, and what is left of their quality (means, without dropped)."""
    if corruption == "none":
        return masks, dict.fromkeys(METRICS, 1.0)
    kind, amount = corruption.split(":")
    table = masks.with_format("arrow")[:].to_pylist()
    originals = [np.array(open_image(row["mask"], row["id"], mode="1")) for row in table]
    changed = corrupt(originals, kind, float(amount), seed)
    pairs = [(new, old) for new, old in zip(changed, originals, strict=True) if new is not None][:COMPARED]
    measured = [compare(new, old, grid) for new, old in pairs]
    quality = {name: float(np.mean([row[name] for row in measured])) for name in METRICS} if measured else {}
    rows = [
        {**row, "mask": to_png(mask), "source": corruption}
        for row, mask in zip(table, changed, strict=True)
        if mask is not None
    ]
    return Dataset.from_list(rows, features=MASK_FEATURES), quality


def run_configuration(
    quickstart: Path, out: Path, corruption: str, fraction: float, seed: int, rows: int | None, with_stage4: bool
) -> dict[str, Any]:
    """Trains and evaluates one configuration; returns its result."""
    started = time.monotonic()
    scenes, start = quickstart / "scenes", quickstart / f"seed-{seed}" / "stage2"
    if not (start / "config.json").is_file():
        raise ValueError(f"{start} holds no stage 2; run `agevlm reproduce --size tiny --seeds {seed}` first")
    processor = load_processor(start, ours=True)
    captions = Dataset(pq.read_table(scenes / "captions" / "train.parquet"))
    captions = captions if rows is None else captions.select(range(min(rows, len(captions))))
    everything = Dataset(pq.read_table(scenes / "masks" / "captions.parquet")).select(range(len(captions)))
    masks, quality = corrupted_masks(everything, corruption, seed, processor.image_processor)
    data = join_masks(captions, masks, fraction, seed)
    guided = len(captions) - data.data.column("guidance").null_count
    work = out / "work" / name_of(corruption, fraction, seed)
    settings = {"seed": seed, "disable_tqdm": True}
    recipe = stage3_ground.recipe(size="tiny", variant="agevlm").override(mask_fraction=fraction, **settings)
    run_stage(recipe, work / "stage3", data=data, init_from=start, console=Console(quiet=True, markup=False))
    final = work / "stage3"
    if with_stage4:
        recipe = stage4_instruct.recipe(size="tiny", variant="agevlm").override(**settings)
        run_stage(recipe, work / "stage4", data=scenes, init_from=final, console=Console(quiet=True, markup=False))
        final = work / "stage4"
    model, processor = load(final, ours=True)
    measured = evaluate_scenes(
        model, processor, scenes, SPLIT, work / "evaluation", benchmarks=(PRESENCE,), batch_size=50, progress=False
    )
    presence = measured["benchmarks"][PRESENCE]
    result = {
        "corruption": corruption,
        "fraction": fraction,
        "seed": seed,
        "rows": len(captions),
        "guided": guided,
        "stage4": with_stage4,
        "quality": quality,
        "presence": presence["accuracy"] / 100,
        # Means over the cross layers; spread evenly over the picture, attention would have `uniform`.
        "mass": presence["grounding"]["in_mask_mass"]["mean"],
        "pointing": presence["grounding"]["pointing_accuracy"]["mean"],
        "uniform": presence["grounding"]["uniform"]["in_mask_mass"],
        "seconds": time.monotonic() - started,
    }
    shutil.rmtree(work)
    return result


def name_of(corruption: str, fraction: float, seed: int) -> str:
    return f"{corruption.replace(':', '-')}_{fraction:g}_{seed}"


def draw(results: Sequence[dict[str, Any]], out: Path) -> None:
    """The figure (means over seeds, bars from the lowest to the highest) and the table of all results."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    grouped: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        grouped[result["corruption"]][result["fraction"]].append(result)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, metric in zip(axes, ("mass", "presence"), strict=True):
        for corruption, by_fraction in grouped.items():
            fractions = sorted(by_fraction)
            values = [np.array([result[metric] for result in by_fraction[fraction]]) for fraction in fractions]
            means = np.array([value.mean() for value in values])
            spread = [means - [v.min() for v in values], np.array([v.max() for v in values]) - means]
            axis.errorbar([100 * f for f in fractions], means, yerr=spread, marker="o", capsize=2, label=corruption)
        axis.set(xscale="log", xlabel="rows with a mask (%)", ylabel=LABELS[metric])
        axis.set_xticks([100 * f for f in FRACTIONS], [f"{100 * f:g}" for f in FRACTIONS])
    axes[1].axhline(0.5, color="grey", linestyle=":", label="chance")
    axes[1].legend(fontsize=8)
    figure.savefig(out / "mask_quality.png", dpi=150)
    pyplot.close(figure)
    lines = [
        "| masks | grid IoU | rows with a mask | seeds | mass | pointing | presence |",
        "|---|---|---|---|---|---|---|",
    ]
    for corruption, by_fraction in grouped.items():
        for fraction, found in sorted(by_fraction.items()):
            told = [_told([result[metric] for result in found]) for metric in LABELS]
            good = _told([result["quality"].get("grid_iou", math.nan) for result in found])
            lines.append(f"| {corruption} | {good} | {100 * fraction:g} % | {len(found)} | {' | '.join(told)} |")
    write_text(out / "mask_quality.md", "\n".join(lines) + "\n")


def _told(values: Sequence[float]) -> str:
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of a finished reproduction of size tiny")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--corruptions", nargs="+", default=list(CORRUPTIONS), metavar="KIND:AMOUNT")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--rows", type=int, help="captions to train on (default: all)")
    parser.add_argument("--stage4", action="store_true", help="train stage 4 behind each, then ask")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    wanted = list(product(options.seeds, options.fractions, options.corruptions))
    for number, (seed, fraction, corruption) in enumerate(wanted, start=1):
        path = options.out / "results" / f"{name_of(corruption, fraction, seed)}.json"
        if not path.is_file():
            result = run_configuration(
                options.quickstart, options.out, corruption, fraction, seed, options.rows, options.stage4
            )
            write_json(path, result)
            print(f"{number} of {len(wanted)}: {path.stem}, mass {result['mass']:.3f}, presence "
                  f"{result['presence']:.3f}, {result['seconds']:.0f} s", flush=True)  # fmt: skip
        found = [json.loads(file.read_text()) for file in sorted((options.out / "results").glob("*.json"))]
        shapes = {(result["rows"], result["stage4"]) for result in found}
        if len(shapes) > 1:
            raise ValueError(f"{options.out} holds results of other --rows or --stage4; choose another folder")
        draw(found, options.out)


if __name__ == "__main__":
    main()
