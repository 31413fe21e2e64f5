"""Orders of an epoch: complete, decided by seed and epoch, and as even or as alike as they promise."""

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler
from training_worker import make_rows, make_trainer

from agevlm.training.sampling import (
    OrderSampler,
    grouped_by_length,
    guided_flags,
    row_lengths,
    set_sampler_epoch,
    spread_evenly,
)
from agevlm.training.streaming import LANES, RUN, WINDOW, shard_order


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(0, 99))
def test_guided_rows_are_spread_evenly_over_any_stretch(flags, seed):
    guided = np.array(flags)
    order = np.random.default_rng(seed).permutation(len(guided))
    spread = spread_evenly(order, guided)
    assert sorted(spread) == list(range(len(guided)))
    for kept in (guided, ~guided):  # each kind in its own order
        assert spread[kept[spread]].tolist() == order[kept[order]].tolist()
    counts = np.concatenate([[0], np.cumsum(guided[spread])])
    for length in {1, 3, 16, len(guided)} & set(range(len(guided) + 1)):
        in_stretch = counts[length:] - counts[:-length]
        assert in_stretch.max() - in_stretch.min() <= 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=400), st.integers(1, 16), st.integers(0, 99))
def test_grouping_by_length_loses_no_row_and_makes_batches_alike(lengths, group_rows, seed):
    lengths = np.array(lengths)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    grouped = grouped_by_length(order, lengths, group_rows, rng)
    assert sorted(grouped) == list(range(len(lengths)))

    def padding(rows):
        groups = lengths[rows[: len(rows) // group_rows * group_rows]].reshape(-1, group_rows)
        return (groups.max(axis=1, initial=0, keepdims=True) - groups).sum()

    assert padding(grouped) <= padding(order)
    whole = len(order) // group_rows * group_rows
    if whole:  # the longest row that is in a whole group comes at once
        assert lengths[grouped[:group_rows]].max() == lengths[order[:whole]].max()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.integers(0, 99))
def test_order_of_shards_is_a_shuffle_that_reads_few_row_groups_at_a_time(sizes, seed):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = shard_order(starts, np.random.default_rng(seed))
    assert sorted(order) == list(range(starts[-1]))
    groups = np.searchsorted(starts, order, side="right") - 1
    first, last = {}, {}
    for place, group in enumerate(groups.tolist()):
        first.setdefault(group, place)
        last[group] = place
    in_use = [sum(first[g] <= place <= last[g] for g in first) for place in range(0, len(order), 7)]
    assert max(in_use) <= LANES * WINDOW


def test_order_of_shards_gives_a_worker_row_groups_of_its_own():
    starts = np.arange(0, 100 * 640 + 1, 100)
    order = shard_order(starts, np.random.default_rng(0))
    batches = order[: len(order) // RUN * RUN].reshape(-1, RUN)
    read_by = [set(np.unique(batches[worker::4] // 100)) for worker in range(4)]  # e.g. 2 devices with 2 workers each
    assert sum(len(groups) for groups in read_by) == 640  # no row group is read twice


def test_order_is_decided_by_seed_and_epoch(tmp_path):
    rows = make_rows("gigtgiiggitg")
    sampler, again = (OrderSampler(rows, seed=3, spread=True) for _ in range(2))
    first = list(sampler)
    assert first == list(again) == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(OrderSampler(rows, seed=4, spread=True)) != first


@pytest.mark.parametrize("make_sampler", [lambda rows: OrderSampler(rows, seed=0), RandomSampler])
def test_processes_that_go_on_in_a_later_epoch_share_its_order(make_sampler):
    """What two processes would read after a restart, side by side: the rest of the second epoch, no row twice."""
    rows = make_rows("i" * 12)

    def loaders(skipped):
        for index in range(2):
            loader = DataLoader(rows, batch_size=2, sampler=make_sampler(rows), collate_fn=lambda rows: rows)
            loader = prepare_data_loader(
                loader,
                num_processes=2,
                process_index=index,
                put_on_device=False,
                use_seedable_sampler=True,
                data_seed=0,
            )
            yield skip_first_batches(loader, skipped) if skipped else loader

    def read(skipped, epoch):
        read = []
        for loader in loaders(skipped):
            set_sampler_epoch(loader, epoch)
            loader.set_epoch(epoch)
            read.append([[row["id"] for row in batch] for batch in loader])
        return [batch for pair in zip(*read, strict=True) for batch in pair]

    assert read(0, epoch=1)[2:] == read(1, epoch=1)
    assert sorted(row_id for batch in read(0, epoch=1) for row_id in batch) == sorted(rows["id"])
    assert read(0, epoch=1) != read(0, epoch=0)


def test_flags_and_lengths_of_rows():
    rows = make_rows("gti")
    assert guided_flags(rows).tolist() == [True, False, False]
    texts = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    assert row_lengths(rows).tolist() == texts
    assert row_lengths(rows.add_column("length", [3, 1, 2])).tolist() == [3, 1, 2]


def test_every_step_of_a_run_has_its_share_of_guided_rows(tmp_path):
    trainer = make_trainer(
        tmp_path, "gggg" + "i" * 12, train_sampling_strategy="random", spread_guided_rows=True,
        per_device_train_batch_size=4,
    )  # fmt: skip
    for batch in trainer.get_train_dataloader():
        assert batch["guidance_query_mask"].any(dim=(1, 2)).sum() == 1


def test_batches_of_a_run_hold_rows_of_one_length(tmp_path):
    kinds = "i" * 16  # answers of 1 to 4 words in turn
    padded = {}
    for strategy in ("random", "group_by_length"):
        loader = make_trainer(
            tmp_path, kinds, train_sampling_strategy=strategy, per_device_train_batch_size=4, guidance_weight=0.0
        ).get_train_dataloader()
        padded[strategy] = sum(int((batch["attention_mask"] == 0).sum()) for batch in loader)
    assert padded["group_by_length"] == 0 < padded["random"]


def test_an_evaluation_keeps_the_order_of_its_rows_under_group_by_length(tmp_path):
    trainer = make_trainer(tmp_path, "igtigt", train_sampling_strategy="group_by_length")
    read = [row_id for batch in trainer.get_eval_dataloader() for row_id in batch["row_ids"]]
    assert read == [f"row-{index}" for index in range(6)]
    assert trainer.evaluate()["eval_loss"] > 0


def test_spreading_does_not_go_with_a_fixed_order(tmp_path):
    trainer = make_trainer(tmp_path, spread_guided_rows=True)  # its order is sequential
    with pytest.raises(ValueError, match="sequential"):
        trainer.get_train_dataloader()
