"""Stages: Table 1's freezing and losses, the paper's numbers, and folders that know what they are."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from training_worker import IN_FLOAT32, CountSteps, Stop, StopAt, make_rows, quick, run_small_stage
from transformers import AutoProcessor, TrainerCallback
from workers import fork, killed_here, same_weights

from agevlm.data.rows import ROW_FEATURES
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.store import read_lines
from agevlm.training import stages
from agevlm.training.adapters import AdapterArguments
from agevlm.training.checkpoints import STAGING
from agevlm.training.freezing import part_of
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align, stage2_adapt_vision, stage3_ground, stage4_instruct
from agevlm.training.stages.recipe import TWINS, Size, Variant, build_recipe
from agevlm.training.trainer import AgeVlmSFTTrainer
from builders import tiny_model, tiny_processor


STAGES = dict(enumerate(stages.STAGES.values(), start=1))
OTHERS = [variant for variant in get_args(Variant) if variant not in (*TWINS, "agevlm")]


def weights(folder):
    return dict(AgeVlmForConditionalGeneration.from_pretrained(folder).named_parameters())


def group_of(name: str) -> str:
    """The columns of Table 1, with the vision encoder divided at its last stage."""
    if part_of(name) == "vision":
        return "vision stage 4" if ".stages.3." in name else "vision before stage 4"
    return part_of(name)


def dry_run(recipe, output_dir, **arguments) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    result = run_stage(recipe, output_dir, dry_run=True, console=console, **arguments)
    assert result.status == "dry run"
    return console.export_text()


# ---- Table 1 ----

MOVES = {
    1: {"projector", "cross_attention"},
    2: {"projector", "cross_attention", "vision stage 4"},
    3: {"projector", "cross_attention", "vision stage 4"},
    4: {"projector", "cross_attention", "vision stage 4", "vision before stage 4", "language_model"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_moves_the_parts_of_table_1_and_no_others(tmp_path, stage):
    changes = {"mask_fraction": 1.0 if stage >= 3 else 0.0, "weight_decay": 0.0, "max_steps": 2, "learning_rate": 3e-3}
    recipe = quick(STAGES[stage](variant="agevlm-lm"), 4, **IN_FLOAT32, loss_spike=None, **changes)
    model, before = tiny_model(), dict(tiny_model().named_parameters())
    run_stage(recipe, tmp_path / "run", data=make_rows(), model=model, processor=tiny_processor())
    after = weights(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {group_of(name) for name in moved} == MOVES[stage]
    still = [name for name in before if group_of(name) in MOVES[stage] and name not in moved]
    assert not still
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["use_cache"]  # the Trainer's default would switch it off for whoever loads the stage


@pytest.mark.parametrize(
    ("variant", "weights_of_stages"),
    [("agevlm", [0, 0, 1, 0]), ("agevlm-lm", [0, 0, 1, 1]), ("ca-baseline", [0, 0, 0, 0])],
)
@pytest.mark.parametrize("size", get_args(Size))
def test_variants_differ_in_the_guidance_weight_alone(size, variant, weights_of_stages):
    for (stage, recipe_of), weight in zip(STAGES.items(), weights_of_stages, strict=True):
        recipe, reference = recipe_of(size, variant), recipe_of(size, "agevlm")
        assert recipe.training["guidance_weight"] == weight
        assert recipe.stage == stage
        same = {"variant": "agevlm", "guidance_weight": reference.training["guidance_weight"]}
        assert recipe.override(**same) == reference


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", get_args(Size))
def test_sizes_change_only_what_they_may(size, stage):
    paper, recipe = STAGES[stage]("paper"), STAGES[stage](size)
    for name in ("name", "stage", "frozen", "data", "paper_rows", "goal"):
        assert getattr(recipe, name) == getattr(paper, name)
    frozen = size != "paper"  # the tower (docs/design.md)
    assert recipe.trains == tuple(part for part in paper.trains if not (frozen and part.startswith("vision")))
    assert (recipe.mask_fraction > 0) == (stage >= 3)
    assert recipe.training["weight_decay"] == (0.05 if size == "tiny" else 0.1)
    for name in ("adam_beta1", "adam_beta2", "warmup_steps", "lr_scheduler_type", "guidance_weight"):
        assert recipe.training[name] == paper.training[name]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("size", "variant"), [*((size, "agevlm") for size in get_args(Size)), *(("tiny", name) for name in OTHERS)]
)
def test_every_recipe_dry_runs(tmp_path, stage, size, variant):
    text = dry_run(STAGES[stage](size, variant), tmp_path / "never", model=tiny_model(), data=make_rows())
    assert f"stage {stage}, {variant}, size {size}" in text
    assert "frozen" in text or stage == 4
    assert list(tmp_path.iterdir()) == []


def test_switches_of_the_ambiguous_readings():
    assert "vision_all" in stage2_adapt_vision.recipe(vision="vision_all").trains
    assert stage4_instruct.recipe(freeze_self_attention=True).frozen == ("self_attention",)


def test_the_batch_of_a_step_does_not_depend_on_the_devices(monkeypatch):
    recipe = stage1_align.recipe()
    for devices, accumulated in ((1, 8), (2, 4), (8, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(devices))
        assert recipe.training_arguments()["gradient_accumulation_steps"] == accumulated
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 device\(s\).*do not divide the recipe's batch of 128"):
        recipe.training_arguments()
    assert recipe.training_arguments(gradient_accumulation_steps=5)["gradient_accumulation_steps"] == 5


def test_wrong_recipes_are_refused():
    with pytest.raises(ValueError, match=r"Unknown size 'huge'\. Choose from paper, small, tiny"):
        stage1_align.recipe(size="huge")
    with pytest.raises(ValueError, match="Unknown variant 'lm'"):
        build_recipe(size="tiny", variant="lm")
    with pytest.raises(ValueError, match="has the fields lerning_rate"):
        stage1_align.recipe().override(lerning_rate=1.0)


# ---- Finished folders ----


def test_a_finished_folder_is_complete_and_the_next_stage_starts_from_it(tmp_path):
    first = run_small_stage(tmp_path / "first", max_steps=2)
    lineage = json.loads((tmp_path / "first" / "agevlm_stage.json").read_text())
    assert lineage == first.lineage
    assert lineage["status"] == "finished"
    assert (lineage["name"], lineage["stage"], lineage["variant"]) == ("stage3_ground", 3, "agevlm")
    assert lineage["data"]["rows"] == 12
    assert lineage["data"]["guided_rows"] == 6 and lineage["data"]["masks_of"] == "texts"
    assert {"loss", "guidance_loss", "in_mask_mass", "pointing_accuracy", "guided_share"} <= lineage["metrics"].keys()
    assert {"torch", "transformers", "trl"} <= lineage["versions"].keys()
    assert STAGING not in os.listdir(tmp_path / "first")
    AutoProcessor.from_pretrained(tmp_path / "first", trust_remote_code=True)

    recipe = quick(stage4_instruct.recipe(size="tiny"), 4, max_steps=1)
    second = run_stage(recipe, tmp_path / "second", data=make_rows(), init_from=tmp_path / "first")
    assert second.lineage["parent"] == {"init_from": "first", "revision": None, "repo": None}
    card = (tmp_path / "second" / "README.md").read_text()
    assert "stage4_instruct" in card
    assert "Intermediate checkpoint" not in card
    assert "Intermediate checkpoint" in (tmp_path / "first" / "README.md").read_text()


def test_the_same_command_again_finds_the_stage_finished(tmp_path):
    first = run_small_stage(tmp_path / "run", max_steps=2)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again = run_small_stage(tmp_path / "run", max_steps=2, logging_steps=2)  # logging decides nothing
    assert again.status == "already finished"
    assert again.lineage == first.lineage
    assert again.log_history == first.log_history
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == files


def test_the_folder_of_another_recipe_is_refused_by_naming_what_changed(tmp_path):
    run_small_stage(tmp_path / "run", max_steps=2)
    with pytest.raises(
        ValueError, match=r"another recipe.*training\.learning_rate: 0\.003 there, 0\.5 asked"
    ) as error:
        run_small_stage(tmp_path / "run", max_steps=2, learning_rate=0.5)
    assert "max_steps" not in str(error.value)
    recipe = quick(stage3_ground.recipe(size="tiny"), max_steps=2)
    with pytest.raises(ValueError, match=r"data\.rows: 12 there, 8 asked"):
        run_stage(recipe, tmp_path / "run", data=make_rows(), model=tiny_model(), processor=tiny_processor())
    with pytest.raises(ValueError, match=r"parent_weights"):
        run_stage(
            recipe,
            tmp_path / "run",
            data=make_rows("gigtgiiggitg"),
            model=tiny_model(seed=1),
            processor=tiny_processor(),
        )


def test_a_folder_with_a_model_of_another_origin_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="another origin"):
        run_small_stage(tmp_path / "model")


def test_nothing_to_start_from_and_no_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Nothing to start from: give `init_from`"):
        run_stage(stage1_align.recipe("tiny"), tmp_path, data=make_rows())
    with pytest.raises(ValueError, match="No data: give `data`"):
        run_stage(stage1_align.recipe("tiny"), tmp_path, model=tiny_model(), processor=tiny_processor())


def test_bad_pictures_in_a_folder_of_scenes_are_left_out_and_listed(tmp_path):
    """A broken one, a name of a file that is there, and an address: nothing outside of the file is read."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (32, 32)).save(secret)
    rows = make_rows("iiiiii").with_format("arrow")[:].to_pylist()
    bad = [(b"no picture", None), (None, str(secret)), (None, "http://127.0.0.1:9/a.png")]
    for row, (data, path) in zip(rows, bad, strict=False):
        row["images"] = [{"bytes": data, "path": path}]
    rows = [{name: row[name] for name in ROW_FEATURES} for row in rows]
    (tmp_path / "scenes/captions").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=ROW_FEATURES.arrow_schema)
    pq.write_table(table, tmp_path / "scenes/captions/train.parquet")
    order = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "random"}
    recipe = quick(stage1_align.recipe(size="tiny"), rows=6, **order)
    result = run_stage(
        recipe, tmp_path / "run", data=tmp_path / "scenes", model=tiny_model(), processor=tiny_processor()
    )
    listed = {line["id"]: line["reason"] for line in read_lines(tmp_path / "run/skipped_rows.jsonl")}
    assert listed.keys() == {row["id"] for row in rows[:3]}
    assert "cannot be decoded" in listed[rows[0]["id"]]
    assert all(name in listed[row["id"]] for (_, name), row in zip(bad[1:], rows[1:3], strict=True))
    assert [log["skipped_rows"] for log in result.log_history if "skipped_rows" in log][-1] == 3


# ---- Interrupted runs ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was left alone, and its result."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_small_stage(folder)


@pytest.mark.parametrize(
    ("killed_after", "left", "steps"),
    [("a step", {"checkpoint-2", "checkpoint-4"}, 2), ("the weights of a checkpoint", {"checkpoint-2", STAGING}, 4)],
)
def test_a_killed_run_resumes_to_the_weights_of_a_whole_one(tmp_path, monkeypatch, whole, killed_after, left, steps):
    stock = AgeVlmSFTTrainer._save_optimizer_and_scheduler

    def save(self, output_dir):
        (killed_here if self.state.global_step == 4 else stock)(self, output_dir)

    callbacks = [StopAt(5, killed=True)]
    if killed_after != "a step":
        monkeypatch.setattr(AgeVlmSFTTrainer, "_save_optimizer_and_scheduler", save)
    fork(lambda: run_small_stage(tmp_path / "run", callbacks), killed=True)
    monkeypatch.undo()
    found = set(os.listdir(tmp_path / "run"))
    assert left | {"agevlm_stage.json"} <= found
    assert {name for name in found if name.startswith("checkpoint-")} == left - {STAGING}
    assert json.loads((tmp_path / "run" / "agevlm_stage.json").read_text())["status"] == "unfinished"

    count = CountSteps()
    resumed = run_small_stage(tmp_path / "run", callbacks=[count])
    assert count.steps == steps
    assert resumed.status == "trained"
    assert same_weights(tmp_path / "run", whole[0])
    drawn, drawn_whole = (
        torch.load(folder / "checkpoint-6/rng_state.pth", weights_only=False)["cpu"]
        for folder in (tmp_path / "run", whole[0])
    )
    assert torch.equal(drawn, drawn_whole)
    assert [entry["step"] for entry in resumed.log_history] == [entry["step"] for entry in whole[1].log_history]
    assert STAGING not in os.listdir(tmp_path / "run")


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    """Saves fall between log entries; the sums of an entry and the tokens so far are in no checkpoint."""
    clock = {"tokens_per_second", "images_per_second", "data_wait", "mfu", "memory_gib", "train_loss"}

    def told(result):
        entries = [{name: entry[name] for name in entry.keys() - clock} for entry in result.log_history]
        return [{name: value for name, value in e.items() if not name.startswith("train_")} for e in entries]

    whole = run_small_stage(tmp_path / "whole", logging_steps=4)
    with pytest.raises(Stop):
        run_small_stage(tmp_path / "run", callbacks=[StopAt(3)], logging_steps=4)
    resumed = run_small_stage(tmp_path / "run", logging_steps=4)
    assert told(resumed) == told(whole)
    assert [entry["step"] for entry in whole.log_history] == [2, 4, 6, 6]
    assert [*whole.lineage["metrics"].items()] == [*resumed.lineage["metrics"].items()]


@pytest.mark.parametrize("max_steps", [-1, 4])
def test_a_run_that_died_before_its_last_save_only_saves(tmp_path, monkeypatch, max_steps):
    """Its last step may end an epoch, or not."""

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    monkeypatch.setattr("agevlm.training.run_stage.publish_files", die)
    with pytest.raises(Death):
        run_small_stage(tmp_path / "run", max_steps=max_steps)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "agevlm_stage.json").read_text())["status"] == "unfinished"
    assert "model.safetensors" not in os.listdir(tmp_path / "run")
    (tmp_path / "run" / STAGING / "final" / "leftover").touch()
    count = CountSteps()
    result = run_small_stage(tmp_path / "run", callbacks=[count], max_steps=max_steps)
    assert count.steps == 0
    assert "leftover" not in os.listdir(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "tokenizer.json").read_text())  # not the padding of some last call
    assert saved["padding"] is None and saved["truncation"] is None
    assert result.lineage["status"] == "finished"
    assert result.lineage["metrics"]["loss"] > 0


def test_without_resume_an_unfinished_run_starts_again(tmp_path, whole):
    killed = Path(shutil.copytree(whole[0], tmp_path / "run"))
    lineage = json.loads((killed / "agevlm_stage.json").read_text())
    (killed / "agevlm_stage.json").write_text(json.dumps({**lineage, "status": "unfinished"}))
    (killed / "checkpoint-6").rename(killed / "checkpoint-60")  # it had come further
    count = CountSteps()
    run_small_stage(killed, callbacks=[count], resume=False)
    assert count.steps == 6
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert same_weights(killed, whole[0])


@pytest.mark.parametrize(
    ("bf16", "asked", "used"), [(True, None, "eager"), (True, "sdpa", "sdpa"), (False, None, "sdpa")]
)
def test_bfloat16_on_a_cpu_trains_with_eager_attention(tmp_path, bf16, asked, used):
    """Unless another kernel is asked for."""
    tiny_model().save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    seen = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append(model.config.text_config._attn_implementation)

    run_stage(
        quick(stage1_align.recipe(size="tiny"), bf16=bf16, max_steps=1),
        tmp_path / "run",
        data=make_rows("ii"),
        init_from=tmp_path / "start",
        adapters=AdapterArguments(attn_implementation=asked),
        callbacks=[Note()],
    )
    assert seen == [used]
