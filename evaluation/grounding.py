"""Where the model looks: attention inside the mask and pointing, per cross layer, against two ways of not looking.

The map of a row is the model's `cross_attention_maps` over the tokens of its question (mean over heads and tokens,
section 3.2.2), the mask is on the same grid.
- in-mask mass: share of the attention on the mask's cells, in [0, 1].
- pointing: whether the most attended cell is one of them.
- `uniform`: the expected value of both for attention spread evenly over the cells that show picture: the mask's share
  of them.
- `centre`: a fixed Gaussian on the centre of the picture, with a deviation of a quarter of each side.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from .benchmark import Benchmark, Metrics
from .inputs import RowError, encode, messages, row_image, row_mask


METRICS = ("in_mask_mass", "pointing_accuracy")


def mass_and_pointing(maps: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In-mask mass and pointing of maps `(..., V)` for masks that broadcast to them; both `(...)` float64.

    A map of zeros has mass 0 and points nowhere.
    """
    maps, mask = np.asarray(maps, dtype=np.float64), np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(maps))
    total = maps.sum(-1)
    mass = (maps * mask).sum(-1) / np.where(total > 0, total, 1)
    peak = np.take_along_axis(mask, maps.argmax(-1, keepdims=True), -1)[..., 0]
    return mass, peak & (total > 0)


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
    benchmark: Benchmark,
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
    records: list[dict[str, Any]] = []
    with tqdm(total=len(marked), desc=f"{benchmark.NAME}: looking", unit="row", disable=not progress) as bar:
        for start in range(0, len(marked), batch_size):
            indices = marked[start : start + batch_size]
            records += _measure_batch(model, processor, benchmark, [rows[index] for index in indices], strict)
            bar.update(len(indices))
    skipped = len(marked) - len(records)
    return {**summarise(records), "skipped": skipped, "layers": list(model.config.cross_attention_layers)}, records


def _measure_batch(
    model: Any, processor: Any, benchmark: Benchmark, rows: Sequence[dict], strict: bool
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
    batch = encode(
        processor, images, [benchmark.prompt(row) for row in usable], model, guidance_spans=spans, guidance_masks=masks
    )
    grid = processor.image_processor.grid
    # V = N * L with one picture per row
    cells = batch.pop("guidance_mask").flatten(1).bool().cpu().numpy()
    visible = batch["visual_token_mask"].flatten(1).bool().cpu().numpy()
    with torch.inference_mode():
        maps = model.base_model(**batch, use_cache=False).cross_attention_maps  # (K, B, V)
    mass, pointing = mass_and_pointing(maps.float().cpu().numpy(), cells)
    records = []
    for index, row in enumerate(usable):
        if not cells[index].any():
            if strict:
                raise RowError(f"row {row['id']}, field mask: the geometry has cut away all of it; use `pad`")
            continue
        share = float((cells[index] & visible[index]).sum() / visible[index].sum())
        prior = centre_prior(visible[index].reshape(grid)).reshape(-1)
        centre = mass_and_pointing(prior, cells[index])
        records.append(
            {
                "id": row["id"],
                "in_mask_mass": mass[:, index].tolist(),
                "pointing_accuracy": pointing[:, index].astype(float).tolist(),
                "uniform": {"in_mask_mass": share, "pointing_accuracy": share},
                "centre": {"in_mask_mass": float(centre[0]), "pointing_accuracy": float(centre[1])},
            }
        )
    return records


def summarise(records: Sequence[dict[str, Any]]) -> Metrics:
    """Means over records; see `measure_grounding`."""
    if not records:
        return {"n": 0}
    result: Metrics = {"n": len(records)}
    for metric in METRICS:
        per_layer = np.mean([record[metric] for record in records], axis=0)
        result[metric] = {"mean": float(per_layer.mean()), "per_layer": per_layer.tolist()}
    for baseline in ("uniform", "centre"):
        result[baseline] = {
            metric: float(np.mean([record[baseline][metric] for record in records])) for metric in METRICS
        }
    result["mass_over_uniform"] = result["in_mask_mass"]["mean"] / result["uniform"]["in_mask_mass"]
    return result
