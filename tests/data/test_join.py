"""Joining masks: by id whatever the order, stable and nested subsets, and clear refusals."""

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agevlm.data.masks import (
    in_subset,
    join_masks,
    share_of_masks,
    subset_hash,
)
from agevlm.data.rows import MASK_FEATURES, which_guided


def rows_of(ids) -> Dataset:
    return Dataset.from_dict({"id": list(ids), "text": [f"text {i}" for i in ids]})


def masks_of(ids) -> Dataset:
    ids = list(ids)
    count = len(ids)
    masks = [Image.new("1", (4, 4 + index), 1) for index in range(count)]
    return Dataset.from_dict(
        {"id": ids, "query": [f"query {i}" for i in ids], "message_index": [0] * count, "mask": masks,
         "source": ["t"] * count, "score": [1.0] * count},
        features=MASK_FEATURES,
    )  # fmt: skip


def test_entries_of_one_id_guide_one_row_phrase_by_phrase():
    rows, ids = rows_of(["a", "b", "c"]), ["c", "c", "a"]
    masks = masks_of(["c", "d", "a"]).remove_columns("id").add_column("id", ids).add_column("occurrence", [None, 1, 0])
    joined = join_masks(rows, masks)
    queries = [[phrase["query"] for phrase in found] if found else found for found in joined["guidance"]]
    assert queries == [["query a"], None, ["query c", "query d"]]
    assert joined[2]["guidance"][1]["occurrence"] == 1
    assert which_guided(joined.data.column("guidance").combine_chunks()).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="'c' more than once"):
        join_masks(rows, masks.select([0, 2, 1]))
    with pytest.raises(ValueError, match="'c' more than once"):
        join_masks(rows, masks.remove_columns("occurrence"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 99), unique=True, max_size=12), st.randoms(use_true_random=False))
def test_masks_find_their_rows(numbers, rng):
    ids = [f"r{n}" for n in numbers]
    chosen = rng.sample(ids, len(ids) // 2)
    joined = join_masks(rows_of(ids), masks_of(chosen))
    assert joined["id"] == ids
    for row in joined:
        if row["id"] in chosen:
            assert row["guidance"]["query"] == f"query {row['id']}"
            assert row["guidance"]["mask"].size == (4, 4 + chosen.index(row["id"]))
        else:
            assert row["guidance"] is None


def test_shuffled_and_selected_data_sets_join_by_id():
    ids = [f"r{n}" for n in range(20)]
    rows, masks = rows_of(ids).shuffle(seed=1).select(range(10)), masks_of(ids).shuffle(seed=2)
    masks = masks.filter(lambda i: i in set(rows["id"]), input_columns="id")
    joined = join_masks(rows, masks)
    assert [row["guidance"]["query"] for row in joined] == [f"query {i}" for i in rows["id"]]
    assert isinstance(joined.features["guidance"]["mask"], ImageFeature)


def test_fraction_is_stable_and_nested():
    ids = [f"r{n}" for n in range(400)]
    rows, masks = rows_of(ids), masks_of(ids)

    def chosen(fraction, seed=0):
        joined = join_masks(rows, masks, fraction, seed)
        return {
            i for i, guidance in zip(ids, joined.with_format("arrow")["guidance"], strict=True) if guidance.is_valid
        }

    assert chosen(0) == set()
    assert chosen(1) == set(ids)
    assert chosen(0.2) < chosen(0.5)
    assert 150 < len(chosen(0.5)) < 250
    assert chosen(0.5) == {i for i in ids if in_subset(i, 0.5)} != chosen(0.5, seed=1)


def test_refusals():
    rows, masks = rows_of(["a", "b"]), masks_of(["a"])
    with pytest.raises(ValueError, match=r"1\.5 is not between"):
        join_masks(rows, masks, 1.5)
    with pytest.raises(ValueError, match=r"1 of 2 masks fit no row: .* same id.* like 'c', ids of rows like 'a'"):
        join_masks(rows, masks_of(["a", "c"]))
    with pytest.raises(ValueError, match="masks have the id 'a' more than once"):
        join_masks(rows, masks_of(["a", "a"]))
    with pytest.raises(ValueError, match="masks: no column score"):
        join_masks(rows, masks.remove_columns("score"))
    with pytest.raises(ValueError, match="already have a column guidance"):
        join_masks(join_masks(rows, masks), masks)


def test_masks_that_were_chosen_once_are_not_chosen_from_again():
    """The paper's numbers, 1,000 times smaller: 7 of 10 rows can be grounded, `--keep` takes 77 of them by the hash
    that training takes its share by."""
    ids = [f"row-{index}" for index in range(2500)]
    kept = sorted((i for i in ids if subset_hash(i, seed=1) < 0.7), key=subset_hash)[:77]
    fraction = 77_000 / 2_500_000
    assert sum(in_subset(i, fraction) for i in kept) < 70
    share = share_of_masks(fraction, len(ids), len(kept))
    assert all(in_subset(i, share) for i in kept)
    assert share_of_masks(fraction, 2500, 2500) == pytest.approx(fraction)  # where all rows have masks
    assert share_of_masks(0.0, 2500, 77) == 0
    with pytest.raises(ValueError, match="not between 0 and 1"):
        share_of_masks(1.5, 10, 10)
