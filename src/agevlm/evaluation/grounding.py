"""Where the model looks: attention inside the mask and pointing, per cross layer, against two ways of not looking.

The map of a row is the model's `cross_attention_maps` over the tokens of its question (mean over heads and tokens,
section 3.2.2), the mask is on the same grid.
- in-mask mass: share of the attention on the mask's cells, in [0, 1].
- pointing: whether the most attended cell is one of them.
- token AUROC: the chance that a cell of the mask is attended more than a visible one outside it (ties count half).
- `uniform`: their expected values for attention spread evenly over the cells that show picture: the mask's share of
  them, and 0.5.
- `centre`: a fixed Gaussian on the centre of the picture, with a deviation of a quarter of each side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from datasets import Image as ImageFeature
from tqdm import tqdm

from agevlm.models import encode, messages, render

from .benchmark import Benchmark, Metrics, Row
from .inputs import RowError, each_picture_once, picture_key, row_image, row_mask
from .processes import is_main, my_share


@dataclass(frozen=True)
class Asked:
    """What looking needs to know of a set of questions: see `Benchmark`."""

    name: str
    prompt: Callable[[Row], str]
    query: Callable[[Row], str]


MASKED = Asked("masks", prompt=lambda row: row["question"], query=lambda row: row["question"])
METRICS = ("in_mask_mass", "pointing_accuracy", "token_auroc")


def load_masked(path: str | Path) -> Dataset:
    """Rows of any set with masks: a Parquet file of `image`, `question`, `mask` (of the picture's size), maybe `id`.

    Raises:
        ValueError: no such file, a missing column, no rows.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; give a Parquet file of image, question, mask")
    rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    missing = [name for name in ("image", "question", "mask") if name not in rows.column_names]
    if missing or not len(rows):
        raise ValueError(f"{path}: lacks {', '.join(missing) or 'rows'}; it has {', '.join(rows.column_names)}")
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{index:06d}" for index in range(len(rows))])
    for column in ("image", "mask"):
        rows = rows.cast_column(column, ImageFeature(decode=False))
    return rows


def mass_and_pointing(maps: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In-mask mass and pointing of maps `(..., V)` for masks that broadcast to them; both `(...)` float64.

    A map of zeros has mass 0 and points nowhere.
    """
    maps, mask = np.asarray(maps, dtype=np.float64), np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(maps))
    total = maps.sum(-1)
    mass = (maps * mask).sum(-1) / np.where(total > 0, total, 1)
    peak = np.take_along_axis(mask, maps.argmax(-1, keepdims=True), -1)[..., 0]
    return mass, peak & (total > 0)


def token_auroc(maps: np.ndarray, mask: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of maps `(..., V)` as scores of the visible cells; `(...)` float64.

    `mask` and `visible`: `(V,)`.

    NaN where every visible cell is inside the mask, or none is.
    """
    inside, outside = np.asarray(mask, bool) & visible, ~np.asarray(mask, bool) & visible
    if not inside.any() or not outside.any():
        return np.full(np.shape(maps)[:-1], np.nan)
    first, second = maps[..., inside][..., :, None], maps[..., outside][..., None, :]
    return (first > second).mean((-2, -1)) + (first == second).mean((-2, -1)) / 2


def centre_prior(visible: np.ndarray) -> np.ndarray:
    """A Gaussian on the centre of the visible cells `(rows, columns)`, 0 elsewhere; sums to 1."""
    rows, columns = np.nonzero(visible)
    squared = np.zeros(len(rows))
    for places in (rows, columns):
        low, high = places.min(), places.max() + 1
        squared += ((places + 0.5 - (low + high) / 2) / ((high - low) / 4)) ** 2
    prior = np.zeros(visible.shape)
    prior[rows, columns] = np.exp(-squared / 2)
    return prior / prior.sum()


def measure_grounding(
    model: Any,
    processor: Any,
    benchmark: Benchmark | Asked,
    rows: Dataset,
    *,
    batch_size: int = 32,
    strict: bool = False,
    progress: bool = True,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Grounding over the rows that have a mask.

    Returns:
        Metrics (`n`, `skipped`, `layers`, each metric as {mean, per_layer}, the baselines `uniform` and `centre`,
        `mass_over_uniform`) and one record per measured row (`id` and the metrics per layer). `skipped` counts bad
        rows and those whose object `crop` has cut away. Without any measured row the metrics are {n: 0, skipped}.
    """
    masks = rows["mask"] if "mask" in rows.column_names else []
    marked = [index for index, mask in enumerate(masks) if mask is not None]
    mine, records = my_share(marked), []
    bar = tqdm(total=len(mine), desc=f"{benchmark.name}: looking", unit="row", disable=not progress or not is_main())
    with bar:
        for start in range(0, len(mine), batch_size):
            indices = mine[start : start + batch_size]
            records += _measure_batch(model, processor, benchmark, [rows[index] for index in indices], strict)
            bar.update(len(indices))
    order = {row_id: index for index, row_id in enumerate(rows["id"])}
    records = sorted(gather_object(records), key=lambda record: order[record["id"]])
    skipped = len(marked) - len(records)
    return {**summarise(records), "skipped": skipped, "layers": list(model.config.cross_attention_layers)}, records


def _measure_batch(
    model: Any, processor: Any, benchmark: Benchmark | Asked, rows: Sequence[dict], strict: bool
) -> list[dict[str, Any]]:
    usable, images, masks, spans = [], [], [], []
    for row in rows:
        try:
            image = row_image(row)
            mask = row_mask(row, image)
        except RowError:
            if strict:
                raise
            continue
        usable.append(row)
        images.append(image)
        masks.append(mask)
        spans.append(processor.message_span(messages(benchmark.prompt(row)), 0, benchmark.query(row)))
    if not usable:
        return []
    texts = [render(processor, benchmark.prompt(row)) for row in usable]
    batch = encode(model, processor, images, texts, guidance_spans=spans, guidance_masks=masks)
    grid = processor.image_processor.grid
    # V = N * L with one picture per row
    cells = batch.pop("guidance_mask").flatten(1).bool().cpu().numpy()
    visible = batch["visual_token_mask"].flatten(1).bool().cpu().numpy()
    with torch.inference_mode(), each_picture_once(model, [picture_key(row) for row in usable]):
        maps = model.base_model(**batch, use_cache=False).cross_attention_maps  # (K, B, V)
    maps = maps.float().cpu().numpy()
    mass, pointing = mass_and_pointing(maps, cells)
    records = []
    for index, row in enumerate(usable):
        if not cells[index].any():
            if strict:
                raise RowError(f"row {row['id']}, field mask: the geometry has cut away all of it; use `pad`")
            continue
        share = float((cells[index] & visible[index]).sum() / visible[index].sum())
        prior = centre_prior(visible[index].reshape(grid)).reshape(-1)
        centre = mass_and_pointing(prior, cells[index])
        auroc = token_auroc(maps[:, index], cells[index], visible[index])
        records.append(
            {
                "id": row["id"],
                "in_mask_mass": mass[:, index].tolist(),
                "pointing_accuracy": pointing[:, index].astype(float).tolist(),
                "token_auroc": [None if np.isnan(area) else float(area) for area in auroc],
                "uniform": {"in_mask_mass": share, "pointing_accuracy": share, "token_auroc": 0.5},
                "centre": {
                    "in_mask_mass": float(centre[0]),
                    "pointing_accuracy": float(centre[1]),
                    "token_auroc": _number(token_auroc(prior, cells[index], visible[index])),
                },
            }
        )
    return records


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _mean(values: Sequence[Any]) -> np.ndarray:
    """Means over the first axis, of the numbers alone."""
    numbers = np.array(values, dtype=float)
    return np.nansum(numbers, axis=0) / np.maximum(1, (~np.isnan(numbers)).sum(axis=0))


def summarise(records: Sequence[dict[str, Any]]) -> Metrics:
    """Means over records; see `measure_grounding`. Rows all of whose cells are marked have no AUROC."""
    if not records:
        return {"n": 0}
    result: Metrics = {"n": len(records)}
    for metric in METRICS:
        per_layer = _mean([record[metric] for record in records])
        result[metric] = {"mean": float(per_layer.mean()), "per_layer": per_layer.tolist()}
    for baseline in ("uniform", "centre"):
        result[baseline] = {
            metric: float(_mean([record[baseline][metric] for record in records])) for metric in METRICS
        }
    result["mass_over_uniform"] = result["in_mask_mass"]["mean"] / result["uniform"]["in_mask_mass"]
    return result
