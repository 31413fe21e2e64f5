"""In which order an epoch shows its rows: pure functions of seed and epoch, and the sampler that hands them out.

An order does not depend on devices, workers or the batch of one device: rows `[s x 128, (s + 1) x 128)` of it make up
step `s` of a run with 128 rows per step, on any machine. So a position in an epoch is one number.

- Sets in shards: row groups together (`streaming.shard_order`); other sets: transformers' own `RandomSampler`.
- `group_by_length`: batches of rows of similar length. transformers' `LengthGroupedSampler` draws from torch's global
  generator, which is another one after a restart and may differ between processes, so its order is computed here.
- `spread_guided_rows`: masks evenly over the order, so that no step has none of them. The paper draws rows at random.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler

from agevlm.data.rows import which_guided
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.streaming import MASK, reader_of, shard_order


BY_LENGTH, LENGTH = "group_by_length", "length"
# Of this many batches of one optimizer step each, the rows are sorted together (transformers' `LengthGroupedSampler`
# takes 50 at most as well).
SORTED_TOGETHER = 50


class OrderSampler(Sampler[int]):
    """The rows of a training set in an order that `seed` and the epoch decide.

    Args:
        rows: of `open_shards`, or any data set with a column `guidance` where `spread` is wanted.
        seed: the order's.
        lengths: the length of each row, for batches of similar rows.
        group_rows: with `lengths`: rows that should be of similar length, those of one optimizer step.
        spread: spread the guided rows evenly.
    """

    def __init__(
        self,
        rows: Dataset,
        seed: int,
        lengths: np.ndarray | None = None,
        group_rows: int = 1,
        spread: bool = False,
    ):
        self.rows, self.seed, self.lengths, self.group_rows = rows, seed, lengths, group_rows
        self.guided = guided_flags(rows) if spread else None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """The order of this epoch: int64 (rows,)."""
        rng = np.random.default_rng((self.seed, self.epoch))
        reader = reader_of(self.rows)
        order = rng.permutation(len(self.rows)) if reader is None else shard_order(reader.starts, rng)
        if self.lengths is not None:
            order = grouped_by_length(order, self.lengths, self.group_rows, rng)
        return order if self.guided is None else spread_evenly(order, self.guided)

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(0, len(order), 10_000):  # a list of Python's integers of 10M rows would be 400 MB
            yield from order[start : start + 10_000].tolist()

    def __len__(self) -> int:
        return len(self.rows)


def make_sampler(rows: Dataset, args: AgeVlmSFTConfig, step_rows: int) -> OrderSampler | None:
    """The sampler of a run's arguments; None where Trainer's does: plain random and sequential orders.

    Args:
        step_rows: rows of one optimizer step.

    Raises:
        ValueError: `spread_guided_rows` with an order that it does not go with.
    """
    strategy, spread = args.train_sampling_strategy, args.spread_guided_rows
    if spread and strategy not in ("random", BY_LENGTH):
        raise ValueError(f"`spread_guided_rows` does not go with `train_sampling_strategy='{strategy}'`.")
    by_length = strategy == BY_LENGTH
    if not (by_length or spread or (strategy == "random" and reader_of(rows) is not None)):
        return None
    return OrderSampler(
        rows,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        lengths=row_lengths(rows, args.length_column_name) if by_length else None,
        group_rows=step_rows,
        spread=spread,
    )


def set_sampler_epoch(loader: DataLoader, epoch: int) -> None:
    """Tell the sampler of a loader the epoch.

    accelerate's `set_epoch` does not reach a sampler behind both its shards for several processes and the batches that
    a resumed run skips: such a run would shuffle a later epoch as the first one.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    sampler = getattr(sampler, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def guided_flags(rows: Dataset) -> np.ndarray:
    """Which rows have a mask: bool (rows,).

    Raises:
        ValueError: rows in which guidance is unknown.
    """
    table = rows.with_format("arrow")
    if reader_of(rows) is not None:
        if MASK not in rows.column_names:
            return np.zeros(len(rows), dtype=bool)
        return table[:].column(MASK).to_numpy() >= 0
    if "guidance" not in rows.column_names:
        raise ValueError("`spread_guided_rows` needs rows with a column `guidance` (`data/masks.py`). Turn it off.")
    batches = table.select_columns(["guidance"]).iter(batch_size=10_000)
    flags = [which_guided(batch.column("guidance").combine_chunks()) for batch in batches]
    return np.concatenate(flags) if flags else np.zeros(0, dtype=bool)


def check_guided(rows: Any, weight: float) -> None:
    """Refuse a run that is to be guided and has no mask.

    Args:
        rows: training rows; of an `IterableDataset` only the columns are known, so the trainer looks again at the end.
        weight: of the guidance loss; 0 asks for none.

    Raises:
        ValueError: no row has a mask.
    """
    if weight == 0 or not isinstance(rows, Dataset | IterableDataset):
        return
    if isinstance(rows, IterableDataset):
        counted, guided = "", rows.column_names is None or "guidance" in rows.column_names
    else:
        known = reader_of(rows) is not None or "guidance" in rows.column_names
        counted, guided = f"{len(rows)} ", known and bool(guided_flags(rows).any())
    if not guided:
        raise ValueError(
            f"Guidance is asked for (`guidance_weight` {weight:g}) and none of the {counted}rows brings a mask: masks "
            "belong in DATA/masks (by phrase: DATA/phrases), where `agevlm data import SOURCE --masks MASKS --output "
            "DATA` puts your own, or come by --masks MASKS of `agevlm ground`, or in a column `guidance` "
            "(`agevlm.data.masks.join_masks`). The paper's recipes guide 3 % of the rows: of a few, --mask-fraction 1 "
            "guides all that have a mask. To train without guidance: --variant ca-baseline, or `guidance_weight=0`"
        )


def row_lengths(rows: Dataset, column: str = LENGTH) -> np.ndarray:
    """The length of each row: its column `column`, or else the characters of its messages: int64 (rows,).

    Raises:
        ValueError: rows of shards that were opened without their lengths.
    """
    table = rows.with_format("arrow")
    if column in rows.column_names:
        return table.select_columns([column])[:].column(column).to_numpy()
    if reader_of(rows) is not None:
        raise ValueError("Lengths of rows in shards are read when they are opened: `open_shards(..., lengths=True)`.")
    lengths: list[int] = []
    for batch in table.select_columns(["messages"]).iter(batch_size=10_000):
        texts = batch.column("messages").to_pylist()
        lengths += [sum(len(message["content"]) for message in messages) for messages in texts]
    return np.asarray(lengths)


def grouped_by_length(order: np.ndarray, lengths: np.ndarray, group_rows: int, rng: np.random.Generator) -> np.ndarray:
    """`order`, rearranged so that each `group_rows` rows in a row have similar lengths.

    Rows are sorted among the next `SORTED_TOGETHER` groups only, and the groups shuffled again, so rows that are far
    apart in `order` stay so. The longest rows come first, to find out at once whether they fit into memory.
    """
    whole = len(order) // group_rows * group_rows
    stretch = group_rows * SORTED_TOGETHER
    grouped = []
    for start in range(0, whole, stretch):
        rows = order[start : min(start + stretch, whole)]
        groups = rows[np.argsort(-lengths[rows], kind="stable")].reshape(-1, group_rows)
        grouped.append(groups[rng.permutation(len(groups))])
    if not grouped:
        return order
    groups = np.concatenate(grouped)
    longest = int(lengths[groups].max(axis=1).argmax())
    groups = np.concatenate([groups[longest : longest + 1], np.delete(groups, longest, axis=0)])
    return np.concatenate([groups.reshape(-1), order[whole:]])


def spread_evenly(order: np.ndarray, guided: np.ndarray) -> np.ndarray:
    """`order`, rearranged so that any `n` rows in a row hold the same number of guided ones, give or take one.

    Guided rows keep their order among themselves, and so do the others.
    """
    flags = guided[order]
    ours, others = order[flags], order[~flags]
    if not len(ours) or not len(others):
        return order
    places = np.arange(len(ours)) * len(order) // len(ours)
    spread = np.empty_like(order)
    taken = np.zeros(len(order), dtype=bool)
    taken[places] = True
    spread[taken], spread[~taken] = ours, others
    return spread
