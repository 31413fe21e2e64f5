"""Where the model looks: attention inside the mask and pointing, per cross layer, against two ways of not looking.

The map of a row is the model's `cross_attention_maps` over the tokens of its question (mean over heads and tokens,
section 3.2.2), the mask is on the same grid. A benchmark's maps come out of the pass that reads the prompt before the
model answers. A row with masks by phrase has a map for each phrase, and its figures are means over its phrases.
- in-mask mass: share of the attention on the mask's cells, in [0, 1].
- pointing: whether the most attended cell is one of them.
- token AUROC: the chance that a cell of the mask is attended more than a visible one outside it (ties count half).
- `uniform`: their expected values for attention spread evenly over the cells that show picture: the mask's share of
  them, and 0.5.
- `centre`: a fixed Gaussian on the center of the picture, with a deviation of a quarter of each side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from agevlm.data.masks import join_masks, load_masks
from agevlm.data.rows import ROW_FEATURES, undecoded
from agevlm.data.tables import check_columns, load_table, read_files
from agevlm.progress import Bar
from agevlm.stats import auroc

from .benchmark import Metrics
from .inputs import Question, each_picture_once, encode_questions, open_rows, picture_key
from .processes import is_main, my_share


MASKED = SimpleNamespace(prompt=itemgetter("question"), query=itemgetter("question"))
METRICS = ("in_mask_mass", "pointing_accuracy", "token_auroc")
Look = dict[str, Any]  # `id`; of each metric the values per layer, and under `uniform` and `centre` one value


def load_masked(path: str | Path, rows_of: str | Path | None = None) -> Dataset:
    """Rows of any set with masks: a Parquet file of `image`, `question`, `mask` (of the picture's size), maybe `id`.

    Args:
        rows_of: the rows that the masks belong to (`data.tables.load_table`); `path` then names masks to join, such as
            `agevlm ground` writes (`data.masks.load_masks`), one a row or one a phrase.

    Raises:
        ValueError: no such file, a missing column, no rows, masks that fit no row.
    """
    if rows_of is not None:
        rows = load_table(str(rows_of))
        check_columns(rows_of, rows.column_names, ROW_FEATURES)
        rows = undecoded(join_masks(rows.select_columns(list(ROW_FEATURES)), load_masks([path])))
        return rows.select(marked_rows(rows))
    if not Path(path).is_file():
        raise ValueError(f"{path} is no file; give a Parquet file of image, question, mask, or --rows for other masks")
    rows = read_files([path], keep_in_memory=True)
    check_columns(path, rows.column_names, ["image", "question", "mask"])
    if not len(rows):
        raise ValueError(f"{path} holds no rows; give another file")
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{index:06d}" for index in range(len(rows))])
    return undecoded(rows)


def marked_rows(rows: Dataset) -> list[int]:
    """Places of the rows that have a mask."""
    name = next((name for name in ("guidance", "mask") if name in rows.column_names), None)
    return [] if name is None else [index for index, mask in enumerate(rows[name]) if mask]


@contextmanager
def looking(model: Any, query_BPT: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """While it lasts, the pass over a prompt with pictures also appends the maps `(K, B, P, V)` of the phrases to the
    list: `generate` answers as without it. Nothing is appended without phrases."""
    maps: list[torch.Tensor] = []
    if query_BPT is None:
        yield maps
        return

    def ask(module: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        reads_prompt = named.get("pixel_values") is not None
        return inputs, {**named, "guidance_query_mask": query_BPT} if reads_prompt else named

    def keep(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if output.cross_attention_maps is not None:
            maps.append(output.cross_attention_maps)

    core = model.base_model
    with core.register_forward_pre_hook(ask, with_kwargs=True), core.register_forward_hook(keep):
        yield maps


def look_records(
    questions: Sequence[Question],
    maps_KBPV: torch.Tensor,
    cells_BPV: torch.Tensor,
    visible_BNL: torch.Tensor,
    grid: tuple[int, int],
    strict: bool,
) -> list[Look]:
    """One record per row with a phrase whose mask has cells left on the grid, the mean over such phrases.

    Raises:
        ValueError: if strict, for a phrase whose object `crop` has cut away, or that stands before the picture.
    """
    maps, cells = maps_KBPV.float().cpu().numpy(), cells_BPV.cpu().numpy()
    visible = visible_BNL.flatten(1).bool().cpu().numpy()  # V = N * L with one picture per row
    records = []
    for index, question in enumerate(questions):
        shown, looks = visible[index], []
        for mask, maps_KV in zip(cells[index], maps[:, index].swapaxes(0, 1), strict=True):
            if not (mask.any() and maps_KV.any()):
                continue
            share = float((mask & shown).sum() / shown.sum())
            prior = _measured(center_prior(shown.reshape(grid)).reshape(1, -1), mask, shown)
            uniform = {"in_mask_mass": share, "pointing_accuracy": share, "token_auroc": 0.5}
            centre = {name: value for name, (value,) in prior.items()}
            looks.append({**_measured(maps_KV, mask, shown), "uniform": uniform, "centre": centre})
        if strict and len(looks) < len(question.phrases):
            raise ValueError(
                f"row {question.row['id']}, field mask: the geometry has cut away all of it (use `pad`), or the words "
                "stand before the picture"
            )
        if looks:
            records.append({"id": question.row["id"], **_mean_look(looks)})
    return records


def _mean_look(looks: Sequence[Any]) -> Any:
    """The mean of a row's phrases, value by value: of mappings, of lists, of numbers, of which some may be None."""
    if isinstance(looks[0], dict):
        return {name: _mean_look([look[name] for look in looks]) for name in looks[0]}
    if isinstance(looks[0], list):
        return [_mean_look(layer) for layer in zip(*looks, strict=True)]
    known = [value for value in looks if value is not None]
    return sum(known) / len(known) if known else None


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
    model: Any, processor: Any, rows: Dataset, *, batch_size: int = 32, strict: bool = False, progress: bool = True
) -> tuple[Metrics, list[Look]]:
    """`summarize` of the rows that have a mask, and their records, without answers."""
    marked = marked_rows(rows)
    mine, records = my_share(marked), []
    bar = Bar(total=len(mine), desc="masks: looking", unit="row", disable=not progress or not is_main())
    with bar, torch.inference_mode():
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size]
            questions, _ = open_rows(processor, MASKED, rows.select(chosen), with_masks=True, strict=strict)
            questions = [question for question in questions if question.phrases]
            if questions:
                batch, query, cells = encode_questions(model, processor, questions)
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
