"""Rows in Parquet shards: what is read, and runs on them that are killed and go on."""

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from training_worker import StopAt, make_rows, run_streamed_stage, write_shards
from transformers.trainer_utils import get_last_checkpoint
from workers import fork, same_weights

from agevlm.data.rows import MASK_FEATURES, ROW_FEATURES, open_row
from agevlm.training import streaming
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.lineage import data_fingerprint
from agevlm.training.sampling import OrderSampler, guided_flags, row_lengths
from agevlm.training.streaming import find_files, load_shards, open_shards, reader_of
from builders import mask, row, tiny_processor


def stored(image):
    """What a shard holds of a picture."""
    return image["bytes"]


@pytest.fixture
def folder(tmp_path):
    """20 rows in 3 shards with row groups of 3, their masks apart."""
    write_shards(tmp_path / "data", "gitg" * 5)
    return tmp_path / "data"


def test_rows_of_shards_are_the_rows_that_were_written(folder):
    rows = load_shards(str(folder), "captions", mask_fraction=1.0)
    expected = make_rows("gitg" * 5).with_format("arrow")[:].to_pylist()
    assert reader_of(rows) is not None and reader_of(make_rows("g")) is None
    assert len(rows) == 20
    for place in np.random.default_rng(0).permutation(20):
        got, want = rows[int(place)], expected[place]
        assert (got["id"], got["messages"]) == (want["id"], want["messages"])
        assert [stored(image) for image in got["images"]] == [stored(image) for image in want["images"]]
        assert (got["guidance"] is None) == (want["guidance"] is None)
        if want["guidance"]:
            assert stored(got["guidance"]["mask"]) == stored(want["guidance"]["mask"])
            assert got["guidance"]["query"] == want["guidance"]["query"]


def test_batches_from_shards_are_those_of_rows_in_memory_also_from_workers(folder):
    collator = AgeVlmDataCollator(tiny_processor())
    rows = load_shards(str(folder), "captions", mask_fraction=1.0)
    for workers in (0, 2):
        loaders = [
            DataLoader(data, batch_size=4, collate_fn=collator, num_workers=workers)
            for data in (rows, make_rows("gitg" * 5))
        ]
        for streamed, in_memory in zip(*loaders, strict=True):
            assert streamed.keys() == in_memory.keys()
            for name in streamed:
                assert torch.equal(streamed[name], in_memory[name])


def test_guidance_inside_of_the_shards_is_taken_in_the_same_subset(tmp_path, folder):
    rows = make_rows("gitg" * 5)
    rows.to_parquet(tmp_path / "joined.parquet", batch_size=3)
    for fraction, most in ((0.0, 0), (0.2, 9), (0.5, 10), (1.0, 10)):
        inside = open_shards([str(tmp_path / "joined.parquet")], mask_fraction=fraction)
        joined = load_shards(str(folder), "captions", mask_fraction=fraction)
        assert guided_flags(inside).tolist() == guided_flags(joined).tolist()
        assert guided_flags(inside).sum() <= most
        if fraction >= 0.5:  # half of the rows have masks
            assert guided_flags(inside).tolist() == guided_flags(rows).tolist()
        for place in range(20):
            assert (inside[place]["guidance"] is None) == (joined[place]["guidance"] is None)


def test_lengths_are_those_of_the_texts(folder):
    rows = load_shards(str(folder), "captions", 1.0, lengths=True)
    assert row_lengths(rows).tolist() == row_lengths(make_rows("gitg" * 5)).tolist()


def test_reader_keeps_few_row_groups_and_travels_without_them(folder, monkeypatch):
    rows = load_shards(str(folder), "captions", 1.0)
    reader = rows.format["format_kwargs"]["transform"]
    one_group = reader._group(0).nbytes
    monkeypatch.setattr(streaming, "CACHE_BYTES", int(2.5 * one_group))
    most = 0
    for place in OrderSampler(rows, seed=0):
        rows[place]
        kept = sum(table.nbytes for table in reader._cache.values())
        assert kept == reader._cached_bytes <= 2.5 * one_group
        most = max(most, len(reader._cache))
    assert most == 2
    assert len(pickle.dumps(rows)) < len(pickle.dumps(make_rows("gitg" * 5)))


def test_a_row_group_is_let_go_when_it_has_been_read(folder):
    rows = load_shards(str(folder), "captions", 1.0)
    reader = rows.format["format_kwargs"]["transform"]
    rows[0], rows[1]
    assert list(reader._cache) == [0]
    rows[2]
    assert not reader._cache and not reader._unread and reader._cached_bytes == 0
    for place in OrderSampler(rows, seed=0):
        rows[place]
    assert not reader._cache


def test_fingerprint_knows_rows_and_masks_but_no_place(tmp_path, folder):
    here = data_fingerprint(load_shards(str(folder), "captions", 1.0))
    assert (here["rows"], here["guided_rows"]) == (20, 10)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert data_fingerprint(load_shards(str(moved), "captions", 1.0)) == here
    assert data_fingerprint(load_shards(str(moved), "captions", 0.5)) == here  # half of the rows have a mask
    assert data_fingerprint(load_shards(str(moved), "captions", 0.25))["fingerprint"] != here["fingerprint"]
    rows = load_shards(str(moved), "captions", 1.0)
    assert data_fingerprint(rows.select(range(19)))["fingerprint"] != here["fingerprint"]


def test_shards_are_read_over_any_fsspec_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.glob("captions/*.parquet"):
        memory.pipe(f"/set/captions/{path.name}", path.read_bytes())
    rows = open_shards(find_files("memory://set/captions", "train-*.parquet"))
    assert [rows[place]["id"] for place in (0, 19)] == ["row-0", "row-19"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"PAR1" + bytes(100)), "train-00000.*cannot be read"),
        (
            lambda path: pq.write_table(pq.read_table(path, columns=["id", "images"]), path),
            "train-00000.*: no column messages",
        ),
    ],
)
def test_bad_shards_are_named_when_they_are_opened(folder, damage, message):
    damage(folder / "captions/train-00000-of-00003.parquet")
    with pytest.raises(ValueError, match=message):
        load_shards(str(folder), "captions", 1.0)


def test_a_file_cut_short_behind_its_back_is_named(folder):
    rows = load_shards(str(folder), "captions", 1.0)
    path = folder / "captions/train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="train-00001"):
        rows[10]


def test_a_shard_that_names_files_is_refused(tmp_path):
    """A name in a data set from elsewhere could be any file of this machine."""
    named = {**row(), "images": [{"bytes": None, "path": "/etc/hostname"}]}
    named.pop("guidance")
    pq.write_table(Dataset.from_list([named], features=ROW_FEATURES).with_format("arrow")[:], tmp_path / "a.parquet")
    (read,) = open_shards([str(tmp_path / "a.parquet")])
    with pytest.raises(ValueError, match=r"row-0'\), images\[0\].*no bytes.*'/etc/hostname' is not opened"):
        open_row(read)


def test_masks_must_fit(folder):
    files = find_files(folder, "captions/*.parquet")
    foreign = Dataset.from_list(
        [{"id": "nobody", "query": "q", "message_index": 0, "mask": mask(), "source": "s", "score": 1.0}],
        features=MASK_FEATURES,
    )
    with pytest.raises(ValueError, match="nobody"):
        open_shards(files, foreign)
    with pytest.raises(ValueError, match="no Parquet shards"):
        open_shards([])


# ---- Runs ----


def test_killed_runs_see_the_rows_and_end_with_the_weights_of_the_uninterrupted_one(tmp_path, folder):
    """20 rows, 2 a step, 2 epochs, a checkpoint every 3 steps; killed in the second epoch, with workers before."""
    through = run_streamed_stage(tmp_path / "through", folder)
    fork(lambda: run_streamed_stage(tmp_path / "killed", folder, [StopAt(14, killed=True)], workers=2), killed=True)
    assert get_last_checkpoint(tmp_path / "killed").endswith("checkpoint-12")
    resumed = run_streamed_stage(tmp_path / "killed", folder)

    assert len(through.rows) == 40 and sorted(through.rows[:20]) == sorted(through.rows[20:])
    assert through.rows[:20] != through.rows[20:]
    assert resumed.rows == through.rows[24:]
    assert same_weights(tmp_path / "through", tmp_path / "killed")


def test_a_set_that_cannot_go_on_where_it_stopped_is_refused(tmp_path):
    rows = make_rows("gi").to_iterable_dataset()
    with pytest.raises(ValueError, match="IterableDataset"):
        run_streamed_stage(tmp_path / "run", rows)
