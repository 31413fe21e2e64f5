"""What a run reports about itself, and that it stops before a step that would ruin it."""

import json
import re
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from training_worker import make_rows, make_trainer, sharp_model
from transformers import TrainerCallback
from trl import SFTTrainer

from agevlm.training.callbacks import DivergedError, Flops, measured_peak
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.freezing import set_trainable
from agevlm.training.sampling import check_guided
from builders import picture, row, tiny_model, tiny_processor


SPEED = {"tokens_per_second", "images_per_second", "data_wait", "mfu", "memory_gib"}


class Poison(TrainerCallback):
    """Makes a weight NaN before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.model.multi_modal_projector.linear_1.weight.data.fill_(float("nan"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with probes that reports to TensorBoard, and the same without either."""
    pytest.importorskip("tensorboard", reason="needs the extra `watch`")
    folder = tmp_path_factory.mktemp("run")
    trainers = []
    for name, watched in (("watched", {"probe_steps": 2, "report_to": "tensorboard"}), ("plain", {})):
        trainer = make_trainer(folder / name, "gigt", max_steps=4, peak_tflops=1e-3, **watched)
        trainer.train()
        trainers.append(trainer)
    return folder, *trainers


def test_entries_of_the_log_say_how_fast_the_run_is(run):
    _, trainer, _ = run
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        assert entry.keys() >= SPEED
        assert entry["tokens_per_second"] > 0 and entry["mfu"] > 0 and 0 <= entry["data_wait"] <= 1
        assert 0.05 < entry["memory_gib"] < 64
    # Steps take turns: two pictures, then one.
    per_picture = [entry["tokens_per_second"] / entry["images_per_second"] for entry in entries]
    assert per_picture[0] < per_picture[1] == pytest.approx(per_picture[3])


def test_probes_are_drawn_reported_and_change_nothing(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, watched, plain = run
    drawn = sorted((folder / "watched/probes").iterdir())
    assert [path.name for path in drawn] == ["step-00000002.png", "step-00000004.png"]
    first, second = (Image.open(path).convert("RGB") for path in drawn)
    assert first.size == second.size and first.width > 512 < first.height  # two guided rows, the scale below
    assert first.tobytes() != second.tobytes()  # the model has moved
    events = EventAccumulator(str(next((folder / "watched").rglob("events.*")).parent))
    events.Reload()
    assert events.Tags()["images"] == ["probes"]
    assert set(events.Tags()["scalars"]) >= {f"train/{name}" for name in SPEED} | {"train/guidance_loss"}
    for ours, other in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, other)
    assert not (folder / "plain/probes").exists()


def test_probes_need_a_row_with_a_mask(tmp_path):
    with pytest.raises(ValueError, match="probe_steps"):
        make_trainer(tmp_path, "it", probe_steps=1, guidance_weight=0.0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_step_and_names_its_rows(tmp_path, accumulation):
    trainer = make_trainer(
        tmp_path, "gigt" * 3, callbacks=[Poison(2)], gradient_accumulation_steps=accumulation, max_steps=3
    )
    with pytest.raises(DivergedError, match=r"stopped-before-step-2\.json"):
        trainer.train()
    facts = json.loads((tmp_path / "stopped-before-step-2.json").read_text())
    assert facts["step"] == 2 and facts["loss"] == "nan" and "nan" in facts["reason"]
    (process,) = facts["processes"]
    rows = [batch["row_ids"] for batch in process["batches"]]
    first = 2 * accumulation
    assert rows == [[f"row-{first + 2 * b}", f"row-{first + 2 * b + 1}"] for b in range(accumulation)]
    assert trainer.state.global_step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped-before-step-2.json"]


def test_a_spike_stops_if_that_is_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, loss_spike=5.0)
    for loss in [1.0] * 19 + [30.0]:  # too early to know what is usual
        trainer._step = [(torch.tensor(loss), ["a"])]
        trainer.check_step()
    trainer._step = [(torch.tensor(4.9), ["a"])]
    trainer.check_step()
    trainer._step = [(torch.tensor(3.0), ["b"]), (torch.tensor(2.5), ["c"])]
    with pytest.raises(DivergedError, match=r"5\.5, more than 5 times the usual 1"):
        trainer.check_step()
    facts = json.loads((tmp_path / "stopped-before-step-1.json").read_text())
    assert [batch["row_ids"] for batch in facts["processes"][0]["batches"]] == [["b"], ["c"]]
    trainer.args.loss_spike = None
    trainer.check_step()


def test_a_gradient_that_overflows_stops_unless_a_scaler_skips_the_step(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._step, trainer._gradient_norm = [(torch.tensor(1.0), ["a"])], torch.tensor(float("inf"))
    with pytest.raises(DivergedError, match="norm is inf"):
        trainer.check_step()
    trainer.args.fp16 = True
    trainer.check_step()


# ---- Rows that cannot be used ----


def with_late_row(rows: Dataset, place: int) -> Dataset:
    """`rows` and among them one whose picture stands behind 200 tokens."""
    late = {**rows[0], "id": "late", "images": [picture()], "guidance": None}
    late["messages"] = [
        {"role": "user", "content": "red apple " * 200 + "<|image|>"},
        {"role": "assistant", "content": "No"},
    ]
    parts = rows.select(range(place)), Dataset.from_list([late], features=rows.features)
    return concatenate_datasets([*parts, rows.select(range(place, len(rows)))])


def trained(folder, rows: Dataset, **overrides):
    trainer = make_trainer(folder, max_length=128, num_train_epochs=2, **overrides)
    trainer.train_dataset = rows
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("place", "batches", "batches_without"),
    [(3, {"per_device_train_batch_size": 6}, {"per_device_train_batch_size": 5}),
     (1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
      {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}),
     (4, {"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 3})],
    ids=["in a batch", "a batch of its own", "in the last batch"],
)  # fmt: skip
def test_a_row_that_cannot_be_used_changes_no_step(tmp_path, place, batches, batches_without):
    """The weights are those of a run over the other rows in the same steps; what is left out is listed and counted."""
    rows = make_rows("gigtg")
    without = trained(tmp_path / "without", rows, **batches_without)
    trainer = trained(tmp_path / "with", with_late_row(rows, place), **batches)
    assert trainer.state.global_step == without.state.global_step
    moved = 0.0
    for ours, other, start in zip(
        trainer.model.parameters(), without.model.parameters(), sharp_model().parameters(), strict=True
    ):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)
        moved = max(moved, float((ours - start).detach().abs().max()))
    assert moved > 1e-3
    (line,) = (tmp_path / "with" / "skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "late" and "behind the first 128 tokens" in json.loads(line)["reason"]
    assert trainer.state.log_history[-1]["skipped_rows"] == 1
    assert not (tmp_path / "without" / "skipped_rows.jsonl").exists()
    assert "skipped_rows" not in without.state.log_history[-1]


def test_a_strict_run_stops_at_such_a_row(tmp_path):
    with pytest.raises(ValueError, match="row late: 1 of its picture placeholders"):
        trained(tmp_path, with_late_row(make_rows("gi"), 1), strict=True)


def test_a_run_that_learns_from_no_row_is_no_success(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 2 rows could not be used.*behind the first 128"):
        trained(tmp_path, with_late_row(make_rows("g"), 0).select([0]))


def test_a_resumed_run_keeps_the_list_and_a_new_one_begins_another(tmp_path):
    trainer = make_trainer(tmp_path, "gi", max_steps=1)
    trainer.skipped.add([["training[0]", "a", "broken"]] * 2, 20)  # in two epochs
    trainer.record_rows()
    trainer.skipped.add([["training[1]", "a", "cut off"]], 1)
    trainer.record_rows()
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert listed == [
        {"place": "training[0]", "id": "a", "reason": "broken"},
        {"place": "training[1]", "id": "a", "reason": "cut off"},
    ]
    with patch.object(SFTTrainer, "train"):
        again = make_trainer(tmp_path, "gi")
        again.train(resume_from_checkpoint="checkpoint-1")
        assert again.skipped.rows == {"training[0]": ["a", "broken"], "training[1]": ["a", "cut off"]}
        again.train()
    assert not again.skipped.rows and not (tmp_path / "skipped_rows.jsonl").exists()


@pytest.mark.parametrize("ids", [["same"] * 6, [None] * 6], ids=["one id", "no id"])
def test_rows_are_told_apart_by_their_place(tmp_path, ids):
    """Two epochs, an evaluation: each bad row is listed once."""
    rows = make_rows("iiiiii").remove_columns("id").add_column("id", ids)
    broken = [{**row, "images": [] if place in (1, 4) else row["images"]} for place, row in enumerate(rows)]
    rows = Dataset.from_list(broken, features=rows.features)
    rows = concatenate_datasets([rows, make_rows("ggggggggg")])
    trainer = trained(tmp_path, rows, per_device_train_batch_size=5)
    bad = range(6) if ids[0] is None else (1, 4)
    listed = [json.loads(line) for line in (tmp_path / "skipped_rows.jsonl").read_text().splitlines()]
    assert {line["place"]: line["id"] for line in listed} == {f"training[{place}]": str(ids[0]) for place in bad}
    assert len(listed) == len(bad) == trainer.state.log_history[-1]["skipped_rows"]
    trainer.evaluate(rows)
    assert trainer.skipped.rows.keys() == {f"{name}[{place}]" for name in ("training", "eval") for place in bad}


def test_rows_of_which_most_are_bad_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, "gi")
    trainer.skipped.add([["training[0]", "a", "broken"]] * 20, 40)
    trainer.record_rows()
    trainer.skipped.add([["training[0]", "a", "broken"]], 0)
    with pytest.raises(ValueError, match=r"21 of 40 rows could not be used.*skipped_rows\.jsonl.*broken"):
        trainer.record_rows()


# ---- Rows whose guidance cannot be followed ----


def unguidable(row_id: str) -> dict:
    """A row with a mask whose query stands before the picture."""
    item = row(row_id, guided=True)
    return {
        **item,
        "messages": [{"role": "user", "content": item["guidance"]["query"] + "<|image|>"}, item["messages"][1]],
    }


def rows_of(*items: dict) -> Dataset:
    features = make_rows("g").features
    return concatenate_datasets([make_rows("gg"), Dataset.from_list(list(items), features=features)])


def test_a_row_that_cannot_be_guided_is_counted_listed_and_trained_on(tmp_path):
    trainer = trained(tmp_path, rows_of(unguidable("early")), per_device_train_batch_size=3)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["guided_share"] for entry in entries] == [pytest.approx(2 / 3)] * 2
    assert entries[-1]["unguided_rows"] == 1 and "skipped_rows" not in entries[-1]
    (line,) = (tmp_path / "unguided_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "early" and "before the picture" in json.loads(line)["reason"]


def test_a_row_that_loses_a_phrase_to_its_length_is_counted_listed_and_guided_by_the_others(tmp_path):
    item = row("long", guided=True)
    item["messages"][1]["content"] = " ".join(["Yes"] * 150)
    last = {**item["guidance"], "message_index": 1, "query": "Yes", "occurrence": 149}
    item["guidance"] = [{**item["guidance"], "occurrence": None}, last]
    others = make_rows("3i")
    rows = concatenate_datasets([others, Dataset.from_list([item], features=others.features)])
    trainer = trained(tmp_path / "lenient", rows, per_device_train_batch_size=3)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["guided_share"] for entry in entries] == [pytest.approx(2 / 3)] * 2
    assert [entry["partly_guided_rows"] for entry in entries] == [1, 1] and "unguided_rows" not in entries[-1]
    (line,) = (tmp_path / "lenient/partly_guided_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "long"
    named = r"guidance\[1\] 'Yes': its query lies behind the first 128 tokens"
    assert re.search(named, json.loads(line)["reason"])
    with pytest.raises(ValueError, match=named):
        trained(tmp_path / "strict", rows, per_device_train_batch_size=3, strict=True)


def test_a_run_in_which_no_mask_can_guide_stops(tmp_path):
    rows = rows_of(unguidable("early")).select([2])
    with pytest.raises(ValueError, match=r"2 of 2 rows with a mask could not be guided.*before the picture"):
        trained(tmp_path / "lenient", rows)
    with pytest.raises(ValueError, match="row early: its query stands before the picture"):
        trained(tmp_path / "strict", rows, strict=True)
    unasked = trained(tmp_path / "unasked", rows, strict=True, guidance_weight=0.0)
    assert "unguided_rows" not in unasked.state.log_history[-1]


def test_a_mask_whose_query_is_not_in_its_text_guides_nothing(tmp_path):
    item = row("row-2", guided=True)
    rows = rows_of({**item, "id": "other", "guidance": {**item["guidance"], "query": "zebra"}}).select([2])
    with pytest.raises(ValueError, match=r"rows with a mask could not be guided.*'zebra' is not in"):
        trained(tmp_path, concatenate_datasets([rows, make_rows("ii")]))


def test_the_end_of_a_run_that_went_on_says_nothing_about_its_start(tmp_path):
    trainer = make_trainer(tmp_path, "gi")
    trainer.unguided.start(trainer.args, going_on=True)
    trainer.unguided.add([["training[0]", "a", "cut off"]], 1)
    trainer.record_rows(at_end=True)
    trainer.unguided.start(trainer.args, going_on=False)
    trainer.unguided.add([["training[0]", "a", "cut off"]], 1)
    with pytest.raises(ValueError, match="1 of 1 rows with a mask"):
        trainer.record_rows(at_end=True)


def test_a_stream_of_rows_without_masks_is_refused(tmp_path):
    rows = make_rows("ii")
    with pytest.raises(ValueError, match="none of the rows brings a mask"):
        check_guided(rows.remove_columns("guidance").to_iterable_dataset(), 1.0)
    check_guided(rows.to_iterable_dataset(), 1.0)
    with pytest.raises(ValueError, match="no row that was trained on has a mask"):
        trained(tmp_path, rows.to_iterable_dataset(), max_steps=2)


def batch_of(rows):
    return AgeVlmDataCollator(tiny_processor())(rows)


def test_flops_are_those_that_torch_counts():
    """Forward, a third of training all weights (torch counts grouped convolutions' backward as dense ones)."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    model.requires_grad_(True)
    batch = batch_of([row("row-0"), row("row-1", seed=5)])
    batch["labels"] = batch["input_ids"].clone()
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    flops = Flops(model)
    tokens, images, counted = flops.of(batch)
    assert (tokens, images) == (batch["input_ids"].numel(), 2)
    # torch counts both halves of causal attention.
    counted += flops.self_attention * float((batch["attention_mask"].sum(1) ** 2).sum())
    assert counted / 3 == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_flops_know_what_trains_and_what_is_there():
    model = tiny_model()
    pictures, text = batch_of([row("row-0", images=2)]), batch_of([row("row-0", images=0)])
    costs = []
    for parts in (("projector",), ("projector", "cross_attention"), ("projector", "cross_attention", "vision_all")):
        set_trainable(model, parts)
        costs.append(Flops(model).of(pictures)[2])
    assert costs == sorted(costs) and costs[0] < costs[1] < costs[2]
    assert Flops(model).of(text)[1:] < Flops(model).of(pictures)[1:]


def test_peak_is_a_rate_that_a_product_reaches():
    drawn = torch.get_rng_state()
    assert 1e8 < measured_peak(torch.device("cpu"), bf16=False) < 1e13
    assert torch.equal(torch.get_rng_state(), drawn), "the run's dropout would depend on when it is measured"


def test_the_total_is_that_of_the_batches(tmp_path):
    trainer = make_trainer(tmp_path, "gigt", num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    of_an_epoch = sum(Flops(trainer.model).of(batch)[2] for batch in trainer.get_train_dataloader())
    assert trainer.state.total_flos == pytest.approx(2 * of_an_epoch)


def test_row_ids_reach_no_model(tmp_path):
    trainer = make_trainer(tmp_path, "gi")
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["row_ids"] == ["row-0", "row-1"]
    assert "row_ids" not in trainer._prepare_inputs(batch)
    assert trainer.evaluate()["eval_loss"] > 0
