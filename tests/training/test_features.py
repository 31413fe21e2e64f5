"""Stored features: the weights of a run that computes them, bit for bit, whatever happens to the run or the store."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from training_worker import IN_FLOAT32, Stop, StopAt, make_arguments, make_rows, quick, run_frozen_stage, write_shards
from workers import fork, fork_ranks, same_weights

from agevlm.data.rows import undecoded
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmVisionTower
from agevlm.store import read_lines
from agevlm.training import collator, features
from agevlm.training.adapters import AdapterArguments
from agevlm.training.callbacks import Flops
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.features import FEATURES, PICTURES, FeatureStore, fix_layout, why_not
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import STAGES, stage1_align, stage2_adapt_vision, stage3_ground, stage4_instruct
from builders import mask, row, same, stored, tiny_model, tiny_processor


ROWS = "gigtgiiggitgi"  # 13: the last batch is smaller, and some rows are text alone
WIDTH, CELLS = 32, 9  # of the tiny tower


def stage1():
    return stage1_align.recipe(size="tiny")


def guided_stage():
    return stage3_ground.recipe(size="tiny")


def whole_language_model():
    return stage4_instruct.recipe(size="tiny", variant="agevlm-lm")


def run(folder: Path, recipe, root: Path | None, rows=None, seed=0, **changes):
    """13 rows in batches of 4, two shuffled epochs."""
    arguments = {name: changes.pop(name) for name in ("callbacks", "eval_data") if name in changes}
    settings = {"num_train_epochs": 2, "save_steps": 3, "logging_steps": 1, **changes}
    return run_stage(
        quick(recipe, 4, **settings),
        folder,
        data=make_rows(ROWS) if rows is None else rows,
        model=tiny_model(seed),
        processor=tiny_processor(),
        stored_features=root,
        **arguments,
    )


@pytest.fixture
def calls(monkeypatch):
    """How many pictures each call of the tower gets."""
    counts: list[int] = []
    stock = AgeVlmVisionTower.forward

    def forward(self, pixel_values, **kwargs):
        counts.append(len(pixel_values))
        return stock(self, pixel_values, **kwargs)

    monkeypatch.setattr(AgeVlmVisionTower, "forward", forward)
    return counts


def make_store(root: Path, **identity) -> FeatureStore:
    return FeatureStore(root, identity, (CELLS, WIDTH), torch.float32)


def fill(store: FeatureStore, rows: Dataset, seen: list[int] | None = None, share=(0, 1), fails_after=None) -> None:
    """Store features that say which picture they are of: all cells hold the mean of its pixels."""
    seen = [] if seen is None else seen

    def compute(pixels):
        if fails_after is not None and len(seen) >= fails_after:
            raise Stop
        seen.extend([1] * len(pixels))
        return pixels.float().mean((1, 2, 3))[:, None, None].expand(-1, CELLS, WIDTH)

    store.fill(rows, tiny_processor().image_processor, compute, 2, workers=0, share=share)
    store.refresh()


# ---- Equal weights ----


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (stage1, {}),
        (stage1, {"bf16": True}),
        (guided_stage, {}),
        (guided_stage, {"per_device_train_batch_size": 1}),
        (whole_language_model, {}),
    ],
)
def test_a_run_that_reads_ends_with_the_weights_of_one_that_computes(tmp_path, recipe, settings, calls):
    computed = run(tmp_path / "computed", recipe(), None, **settings)
    in_a_call = settings.get("per_device_train_batch_size", 4)
    assert set(calls) == {in_a_call}
    calls.clear()
    read = run(tmp_path / "read", recipe(), tmp_path / "store", **settings)
    assert same_weights(tmp_path / "read", tmp_path / "computed")
    assert not same_weights(tmp_path / "read", run_start(tmp_path))
    assert read.lineage["recipe"] == computed.lineage["recipe"]
    assert set(calls) == {in_a_call} and len(calls) <= -(-len(ROWS) // in_a_call)  # each picture once, in two epochs
    for name in ("loss", "grad_norm", "in_mask_mass"):
        one, other = ([entry.get(name) for entry in result.log_history] for result in (computed, read))
        assert one == other
    calls.clear()
    run(tmp_path / "again", recipe().override(seed=1), tmp_path / "store", **settings)
    assert not calls
    assert len(list((tmp_path / "store").iterdir())) == 1


def run_start(folder: Path) -> Path:
    tiny_model().save_pretrained(folder / "start")
    return folder / "start"


def test_features_of_rows_with_several_pictures_and_of_held_rows(tmp_path, calls):
    """The blank place beside a row with fewer pictures changes nothing either."""
    rows = make_rows("it").to_list() + [row(f"two-{n}", images=2, seed=20 + n) for n in range(3)]
    rows = Dataset.from_list([{**r, "guidance": None} for r in rows])
    results = []
    for name, root in (("computed", None), ("read", tmp_path / "store")):
        held = make_rows("gti")
        changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "eval_data": held}
        results.append(run(tmp_path / name, stage1(), root, undecoded(rows), **changes))
    assert same_weights(tmp_path / "read", tmp_path / "computed")
    one, other = ([e["eval_loss"] for e in result.log_history if "eval_loss" in e] for result in results)
    assert one == other and len(one) > 1


def test_adapters_train_beside_a_tower_that_stays(tmp_path):
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    recipe = quick(stage4_instruct.recipe(size="small", variant="agevlm-lm"), 4, max_steps=3)
    for name, root in (("computed", None), ("read", tmp_path / "store")):
        adapters = AdapterArguments(use_peft=True, lora_r=4, lora_dropout=0.3)  # the same units are dropped
        run_stage(
            recipe, tmp_path / name, data=make_rows(ROWS), init_from=tmp_path / "start", adapters=adapters,
            stored_features=root,
        )  # fmt: skip
    assert same_weights(tmp_path / "read", tmp_path / "computed")


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    run(tmp_path / "computed", guided_stage(), None)
    with pytest.raises(Stop):
        run(tmp_path / "read", guided_stage(), tmp_path / "store", callbacks=[StopAt(5)])
    assert (tmp_path / "read" / "checkpoint-3").exists()
    run(tmp_path / "read", guided_stage(), tmp_path / "store")
    assert same_weights(tmp_path / "read", tmp_path / "computed")
    # And a run that has computed may read from here on.
    with pytest.raises(Stop):
        run(tmp_path / "changed", guided_stage(), None, callbacks=[StopAt(5)])
    run(tmp_path / "changed", guided_stage(), tmp_path / "store")
    assert same_weights(tmp_path / "changed", tmp_path / "computed")


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    fork(lambda: run_frozen_stage(tmp_path / "read", computes=False, callbacks=[StopAt(3, killed=True)]), killed=True)
    assert (tmp_path / "read" / "checkpoint-2").exists()
    run_frozen_stage(tmp_path / "read", computes=False)
    run_frozen_stage(tmp_path / "computed", computes=True)
    assert same_weights(tmp_path / "read", tmp_path / "computed")


@pytest.mark.slow
def test_two_processes_store_a_share_each_and_take_equal_steps(tmp_path):
    for name in ("read", "computed"):
        fork_ranks(lambda name=name: run_frozen_stage(tmp_path / name, computes=name == "computed"))
    assert same_weights(tmp_path / "read", tmp_path / "computed")
    (store,) = (tmp_path / "store").iterdir()
    parts = sorted(path.parent.name for path in store.glob(f"*/{PICTURES}"))
    assert parts == ["part-00000", "part-00001"]
    assert all((store / part / PICTURES).stat().st_size for part in parts)


def test_rows_in_shards(tmp_path):
    write_shards(tmp_path / "data", ROWS)
    for name, root in (("computed", None), ("read", tmp_path / "store")):
        run(tmp_path / name, guided_stage(), root, tmp_path / "data", dataloader_num_workers=1)
    assert same_weights(tmp_path / "read", tmp_path / "computed")


def test_a_row_that_cannot_be_used_is_left_out_as_it_is_without(tmp_path):
    rows = undecoded(make_rows(ROWS)).to_list()
    rows[0]["images"][0]["bytes"] = rows[0]["images"][0]["bytes"][:200]
    rows[2]["guidance"]["mask"] = stored(mask(50, 50))
    rows = Dataset.from_list(rows, features=undecoded(make_rows(ROWS)).features)
    for name, root in (("computed", None), ("read", tmp_path / "store")):
        run(tmp_path / name, guided_stage(), root, rows)
    assert same_weights(tmp_path / "read", tmp_path / "computed")
    one, other = (read_lines(tmp_path / name / "skipped_rows.jsonl") for name in ("computed", "read"))
    by_id = [sorted(lines, key=lambda line: line["id"]) for lines in (one, other)]
    assert by_id[0] == by_id[1] and [line["id"] for line in by_id[0]] == ["row-0", "row-2"]


def test_no_picture_is_opened_in_training(tmp_path, monkeypatch):
    root = tmp_path / "store"
    run(tmp_path / "first", stage1(), root)

    def refuse(image, where, **_):
        raise AssertionError(where)

    monkeypatch.setattr(collator, "open_image", refuse)
    monkeypatch.setattr(features, "open_image", refuse)
    run(tmp_path / "second", stage1(), root)
    assert same_weights(tmp_path / "first", tmp_path / "second")


def test_probes_and_speed_know_features(tmp_path):
    run(tmp_path / "read", guided_stage(), tmp_path / "store", probe_steps=3)
    run(tmp_path / "computed", guided_stage(), None, probe_steps=3)
    drawn = [(tmp_path / name / "probes/step-00000003.png").read_bytes() for name in ("read", "computed")]
    assert drawn[0] == drawn[1]
    model, batch = tiny_model(), AgeVlmDataCollator(tiny_processor())([row()])
    without_tower = Flops(model)
    without_tower.tower = []
    reads = Flops(model).of({**batch, "pixel_values": torch.zeros(1, 1, 1, CELLS, WIDTH)})
    assert reads == without_tower.of(batch) and reads[2] < Flops(model).of(batch)[2]


# ---- One layout ----


def test_a_frozen_tower_runs_in_one_layout_and_without_gradients(calls):
    """A picture's features depend on nothing but the picture, whatever batch it is in."""
    tower = tiny_model().train().model.vision_tower
    pixels = torch.randn(7, 3, 96, 96)
    fix_layout(tower, 4)
    whole = tower(pixels).last_hidden_state
    assert calls == [4, 4] and not whole.requires_grad and not tower.training
    order = torch.randperm(7)
    assert torch.equal(tower(pixels[order]).last_hidden_state, whole[order])
    assert all(torch.equal(tower(pixels[n : n + 1]).last_hidden_state, whole[n : n + 1]) for n in range(7))
    calls.clear()
    assert torch.equal(tower(whole[:, None]).last_hidden_state, whole) and not calls
    del tower.forward
    assert tower(pixels).last_hidden_state.requires_grad


def test_the_model_is_like_a_new_one_afterwards(tmp_path, calls):
    model = tiny_model()
    arguments = {"data": make_rows("ii"), "processor": tiny_processor(), "stored_features": tmp_path / "store"}
    run_stage(quick(stage1(), max_steps=1), tmp_path / "run", model=model, **arguments)
    calls.clear()
    model.get_image_features(torch.randn(3, 3, 96, 96))
    assert calls == [3]


# ---- What is refused ----


def test_what_cannot_read_features_is_refused_before_anything_is_written(tmp_path):
    assert [why_not(recipe(), make_arguments(tmp_path)) is None for recipe in STAGES.values()] == [
        True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"stage2_adapt_vision trains the vision tower \(vision_last_stage\)"):
        run(tmp_path / "run", stage2_adapt_vision.recipe().override(**IN_FLOAT32), tmp_path / "store")
    with pytest.raises(ValueError, match="twin"):
        run(tmp_path / "run", stage1_align.recipe(size="tiny", variant="twin"), tmp_path / "store")
    with pytest.raises(ValueError, match="torch_compile"):
        run(tmp_path / "run", stage1(), tmp_path / "store", torch_compile=True)
    assert not list(tmp_path.iterdir())


def test_shards_of_the_tower_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP" in why_not(stage1(), make_arguments(tmp_path))


def test_a_disk_that_is_too_small_is_said_before_it_is_full(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"0\.0 GB free and .* \(1,152 bytes a picture\)"):
        run(tmp_path / "run", stage1(), tmp_path / "store")
    assert not list((tmp_path / "store").rglob(PICTURES))


def test_rows_that_changed_behind_a_full_store_are_named(tmp_path):
    run(tmp_path / "run", stage1(), tmp_path / "store")
    rows = undecoded(make_rows(ROWS)).to_list()
    rows[2]["images"] = [stored(row(seed=77)["images"][0])]
    changed = Dataset.from_list(rows, features=undecoded(make_rows(ROWS)).features)
    with pytest.raises(RuntimeError, match=r"row \(id 'row-2'\), images\[0\].*has no features of the picture"):
        run(tmp_path / "other", stage1(), tmp_path / "store", changed)


# ---- The store ----


def test_another_tower_or_processor_has_a_store_of_its_own(tmp_path):
    root = tmp_path / "store"
    run(tmp_path / "a", stage1(), root)
    run(tmp_path / "b", stage1(), root, seed=1)
    run(tmp_path / "c", stage1(), root, per_device_train_batch_size=2)
    assert len(list(root.iterdir())) == 3


def test_what_was_stored_before_an_interruption_is_kept(tmp_path, monkeypatch):
    """Also where the kill has left half a picture in either file."""
    monkeypatch.setattr(features, "FLUSH_BYTES", 1)
    rows, store, seen = undecoded(make_rows("i" * 9)), make_store(tmp_path), []
    with pytest.raises(Stop):
        fill(store, rows, seen, fails_after=4)
    part = store.folder / "part-00000"
    for name, torn in ((PICTURES, b"\1" * 5), (FEATURES, b"\1" * 3000)):
        with (part / name).open("ab") as file:
            file.write(torn)
    store = make_store(tmp_path)
    assert len(store) == 4
    seen.clear()
    fill(store, rows, seen)
    assert len(seen) == 5 and len(store) == 9
    whole = make_store(tmp_path / "whole")
    fill(whole, rows)
    for name in (PICTURES, FEATURES):
        assert (part / name).read_bytes() == (whole.folder / "part-00000" / name).read_bytes()


def test_each_picture_is_stored_once_and_found_by_its_file(tmp_path):
    rows = undecoded(Dataset.from_list(make_rows("iti").to_list() * 3, features=make_rows("i").features))
    store, seen = make_store(tmp_path), []
    fill(store, rows, seen)
    assert len(seen) == len(store) == 2
    shown = [rows[0]["images"][0], rows[2]["images"][0]]
    for reader in (store, pickle.loads(pickle.dumps(store))):
        opened = [reader.open(image, "here") for image in shown]
        assert [picture.size for picture in opened] == [(96, 96)] * 2
        values = reader.read([picture.place for picture in opened])
        assert values.shape == (2, 1, CELLS, WIDTH)
        means = [np.asarray(make_rows("iti")[n]["images"][0]).mean() for n in (0, 2)]
        assert values[:, 0, 0, 0].tolist() == pytest.approx(means)
    with pytest.raises(ValueError, match=r"here: the picture cannot be decoded"):
        store.open({"bytes": b"nothing", "path": None}, "here")
    (store.folder / "part-00000" / FEATURES).write_bytes(b"")
    with pytest.raises(ValueError, match=r"features.bin is damaged"):
        make_store(tmp_path).read([0])


def test_several_runs_may_store_at_once(tmp_path):
    """They take turns at a part; whoever comes second finds what is there."""
    rows, counts = undecoded(make_rows("i" * 12)), [[], [], []]
    stores = [make_store(tmp_path) for _ in counts]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda item: fill(item[0], rows, item[1]), zip(stores, counts, strict=True)))
    assert sorted(map(len, counts)) == [0, 0, 12]
    assert all(len(store) == 12 for store in stores)
    places = np.array([[store.open(image["images"][0], "").place for image in rows] for store in stores])
    assert (places == places[0]).all()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone says what is mapped")
def test_reading_maps_nothing_into_memory(tmp_path):
    store = make_store(tmp_path)
    fill(store, undecoded(make_rows("i" * 6)))
    store.read(list(range(6)))
    assert FEATURES not in Path("/proc/self/maps").read_text()


def test_a_batch_of_features_has_the_masks_of_the_pictures(tmp_path):
    """Padded cells, guidance, labels: all but the pixels."""
    rows = [
        row("a"),
        {**row("b", guided=False, seed=1), "images": [stored(row(seed=5)["images"][0].crop((0, 0, 96, 30)))]},
    ]
    rows.append(row("c", images=0))
    plain = AgeVlmDataCollator(tiny_processor())
    store = make_store(tmp_path)
    fill(store, rows)
    reading = AgeVlmDataCollator(tiny_processor(), features=store)
    one, other = plain(rows), reading(rows)
    assert not one["visual_token_mask"][:2].all()
    assert one.pop("pixel_values").shape == (3, 1, 3, 96, 96)
    assert other.pop("pixel_values").shape == (3, 1, 1, CELLS, WIDTH)
    assert same(one, other)
