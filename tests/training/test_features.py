"""Stored features: the weights of a run that computes them, bit for bit, whatever happens to the run or the store."""

from pathlib import Path

import pytest
from datasets import Dataset
from training_worker import make_rows, quick
from workers import same_weights

from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align, stage3_ground
from builders import tiny_model, tiny_processor


ROWS = "gigtgiiggitgi"  # 13: the last batch is smaller; text alone among them


def stage1():
    return stage1_align.recipe(size="tiny")


def guided_stage():
    """Stage 3 with a tower that stays as it is."""
    return stage3_ground.recipe(size="tiny").override(trains=("projector", "cross_attention"))


def run(folder: Path, recipe, stored: Path | None, rows: Dataset | None = None, callbacks=(), step_rows=4, **changes):
    settings = {"num_train_epochs": 2, "save_steps": 3, "logging_steps": 1, **changes}
    return run_stage(
        quick(recipe, step_rows, **settings),
        folder,
        data=make_rows(ROWS) if rows is None else rows,
        model=tiny_model(),
        processor=tiny_processor(),
        stored_features=stored,
        callbacks=callbacks,
    )


@pytest.fixture
def passes(monkeypatch):
    """Counts the pictures of each call of the tower."""
    calls: list[int] = []
    from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmVisionTower

    stock = AgeVlmVisionTower.forward

    def forward(self, pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return stock(self, pixel_values, **kwargs)

    monkeypatch.setattr(AgeVlmVisionTower, "forward", forward)
    return calls


def store_in(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


@pytest.mark.parametrize("recipe", [stage1, guided_stage])
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"per_device_train_batch_size": 1}], ids=str)
def test_a_run_that_reads_ends_with_the_weights_of_one_that_computes(tmp_path, recipe, settings, passes):
    computed = run(tmp_path / "computed", recipe(), None, **settings)
    passes.clear()
    read = run(tmp_path / "read", recipe(), tmp_path / "store", **settings)
    assert same_weights(tmp_path / "read", tmp_path / "computed")
    assert read.lineage["recipe"] == computed.lineage["recipe"]
    pictures = ROWS.count("g") + ROWS.count("i")
    calls = settings.get("per_device_train_batch_size", 4)
    assert set(passes) == {calls}
    assert len(passes) <= len(ROWS) // calls + 1 and len(passes) * calls >= pictures  # one epoch of two, at most
    losses = [[entry["loss"] for entry in result.log_history if "loss" in entry] for result in (computed, read)]
    assert losses[0] == losses[1]
