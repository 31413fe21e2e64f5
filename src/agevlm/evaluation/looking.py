"""Where the model looks: attention inside the mask and pointing, per cross layer, against two ways of not looking.

The map of a row is the model's `cross_attention_maps` over the tokens of its question (mean over heads and tokens,
section 3.2.2), the mask is on the same grid. A benchmark's maps come out of the pass that reads the prompt before the
model answers.
- in-mask mass: share of the attention on the mask's cells, in [0, 1].
- pointing: whether the most attended cell is one of them.
- token AUROC: the chance that a cell of the mask is attended more than a visible one outside it (ties count half).
- `uniform`: their expected values for attention spread evenly over the cells that show picture: the mask's share of
  them, and 0.5.
- `centre`: a fixed Gaussian on the center of the picture, with a deviation of a quarter of each side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm

from agevlm.data.rows import undecoded
from agevlm.data.tables import read_files
from agevlm.stats import auroc

from .benchmark import Metrics
from .inputs import Asked, Question, RowError, each_picture_once, encode_questions, open_rows, picture_key
from .processes import is_main, my_share


MASKED = Asked("masks", prompt=lambda row: row["question"], query=lambda row: row["question"])
METRICS = ("in_mask_mass", "pointing_accuracy", "token_auroc")
Look = dict[str, Any]  # `id`; of each metric the values per layer, and under `uniform` and `centre` one value


def load_masked(path: str | Path) -> Dataset:
    """Rows of any set with masks: a Parquet file of `image`, `question`, `mask` (of the picture's size), maybe `id`.

    Raises:
        ValueError: no such file, a missing column, no rows.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; give a Parquet file of image, question, mask")
    rows = read_files([path], keep_in_memory=True)
    missing = [name for name in ("image", "question", "mask") if name not in rows.column_names]
    if missing or not len(rows):
        raise ValueError(f"{path}: lacks {', '.join(missing) or 'rows'}; it has {', '.join(rows.column_names)}")
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{index:06d}" for index in range(len(rows))])
    return undecoded(rows)


def marked_rows(rows: Dataset) -> list[int]:
    """Places of the rows that have a mask."""
    masks = rows["mask"] if "mask" in rows.column_names else []
    return [index for index, mask in enumerate(masks) if mask is not None]


@contextmanager
def looking(model: Any, query_BT: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """While it lasts, the pass over a prompt with pictures also appends the maps `(K, B, V)` of the queries to the
    list: `generate` answers as without it. Nothing is appended without queries."""
    maps: list[torch.Tensor] = []
    if query_BT is None:
        yield maps
        return

    def ask(module: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        reads_prompt = named.get("pixel_values") is not None
        return inputs, {**named, "guidance_query_mask": query_BT} if reads_prompt else named

    def keep(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if output.cross_attention_maps is not None:
            maps.append(output.cross_attention_maps)

    core = model.base_model
    hooks = [core.register_forward_pre_hook(ask, with_kwargs=True), core.register_forward_hook(keep)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def look_records(
    questions: Sequence[Question],
    maps_KBV: torch.Tensor,
    cells_BV: torch.Tensor,
    visible_BNL: torch.Tensor,
    grid: tuple[int, int],
    strict: bool,
) -> list[Look]:
    """One record per row whose mask has cells left on the grid.

    Raises:
        RowError: if strict, for a row whose object `crop` has cut away.
    """
    maps, cells = maps_KBV.float().cpu().numpy(), cells_BV.cpu().numpy()
    visible = visible_BNL.flatten(1).bool().cpu().numpy()  # V = N * L with one picture per row
    records = []
    for index, question in enumerate(questions):
        if question.mask is None:
            continue
        mask, shown = cells[index], visible[index]
        if not mask.any():
            if strict:
                where = f"row {question.row['id']}, field mask"
                raise RowError(f"{where}: the geometry has cut away all of it; use `pad`")
            continue
        share = float((mask & shown).sum() / shown.sum())
        prior = center_prior(shown.reshape(grid)).reshape(1, -1)
        records.append(
            {
                "id": question.row["id"],
                **_measured(maps[:, index], mask, shown),
                "uniform": {"in_mask_mass": share, "pointing_accuracy": share, "token_auroc": 0.5},
                "centre": {name: value for name, (value,) in _measured(prior, mask, shown).items()},
            }
        )
    return records


def _measured(maps_KV: np.ndarray, mask_V: np.ndarray, visible_V: np.ndarray) -> dict[str, list[float | None]]:
    """Every metric of K maps. There is no AUROC where every visible cell is inside the mask, or none is."""
    mass, pointing = mass_and_pointing(maps_KV, mask_V)
    inside, outside = mask_V & visible_V, ~mask_V & visible_V
    apart = inside.any() and outside.any()
    areas = [auroc(cells[inside], cells[outside]) if apart else None for cells in maps_KV]
    return dict(zip(METRICS, (mass.tolist(), pointing.astype(float).tolist(), areas), strict=True))


def mass_and_pointing(maps: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In-mask mass and pointing of maps `(..., V)` for masks that broadcast to them; both `(...)` float64.

    A map of zeros has mass 0 and points nowhere.
    """
    maps, mask = np.asarray(maps, dtype=np.float64), np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(maps))
    total = maps.sum(-1)
    mass = (maps * mask).sum(-1) / np.where(total > 0, total, 1)
    peak = np.take_along_axis(mask, maps.argmax(-1, keepdims=True), -1)[..., 0]
    return mass, peak & (total > 0)


def center_prior(visible: np.ndarray) -> np.ndarray:
    """A Gaussian on the center of the visible cells `(rows, columns)`, 0 elsewhere; sums to 1."""
    rows, columns = np.nonzero(visible)
    squared = np.zeros(len(rows))
    for places in (rows, columns):
        low, high = places.min(), places.max() + 1
        squared += ((places + 0.5 - (low + high) / 2) / ((high - low) / 4)) ** 2
    prior = np.zeros(visible.shape)
    prior[rows, columns] = np.exp(-squared / 2)
    return prior / prior.sum()


def measure_looking(
    model: Any,
    processor: Any,
    asked: Any,
    rows: Dataset,
    *,
    batch_size: int = 32,
    strict: bool = False,
    progress: bool = True,
) -> tuple[Metrics, list[Look]]:
    """`summarize` of the rows that have a mask, and their records, without answers.

    Args:
        asked: a `Benchmark` or `Asked`.
    """
    marked = marked_rows(rows)
    mine, records = my_share(marked), []
    bar = tqdm(total=len(mine), desc=f"{asked.name}: looking", unit="row", disable=not progress or not is_main())
    with bar, torch.inference_mode():
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size]
            questions, _ = open_rows(processor, asked, rows.select(chosen), with_masks=True, strict=strict)
            questions = [question for question in questions if question.mask is not None]
            if questions:
                batch, query, cells = encode_questions(model, processor, asked, questions)
                assert cells is not None  # every question has a mask
                with each_picture_once(model, [picture_key(question.row) for question in questions]):
                    output = model.base_model(**batch, guidance_query_mask=query, use_cache=False)
                seen, grid = batch["visual_token_mask"], processor.image_processor.grid
                records += look_records(questions, output.cross_attention_maps, cells, seen, grid, strict)
            bar.update(len(chosen))
    order = {row_id: index for index, row_id in enumerate(rows["id"])}
    records = sorted(gather_object(records), key=lambda record: order[record["id"]])
    return summarize(records, len(marked), list(model.config.cross_attention_layers)), records


def summarize(records: Sequence[Look], marked: int, layers: Sequence[int]) -> Metrics:
    """Means over records.

    Args:
        marked: rows with a mask; those without a record count as skipped.

    Returns:
        `n`, `skipped`, `layers`, each metric as {mean, per_layer}, the baselines `uniform` and `centre`, and
        `mass_over_uniform`; without any record {n: 0, skipped, layers}. Rows all of whose cells are marked have no
        AUROC.
    """
    result: Metrics = {"n": len(records), "skipped": marked - len(records), "layers": list(layers)}
    if not records:
        return result
    for metric in METRICS:
        per_layer = _mean([record[metric] for record in records])
        result[metric] = {"mean": float(per_layer.mean()), "per_layer": per_layer.tolist()}
    for baseline in ("uniform", "centre"):
        result[baseline] = {
            metric: float(_mean([record[baseline][metric] for record in records])) for metric in METRICS
        }
    result["mass_over_uniform"] = result["in_mask_mass"]["mean"] / result["uniform"]["in_mask_mass"]
    return result


def _mean(values: Sequence[Any]) -> np.ndarray:
    """Means over the first axis, of the numbers alone."""
    numbers = np.array(values, dtype=float)
    return np.nansum(numbers, axis=0) / np.maximum(1, (~np.isnan(numbers)).sum(axis=0))
