"""The guidance trainer: exactly stock SFT at weight 0, the plain objective otherwise, however a step is divided."""

import os
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from training_worker import (
    KINDS,
    PHRASES,
    TWO_PROCESS_KINDS,
    make_arguments,
    make_rows,
    make_trainer,
    sharp_model,
    step_gradients,
)
from trl import SFTConfig, SFTTrainer
from workers import fork_ranks

from agevlm.training.collator import AgeVlmDataCollator, guided_phrases
from agevlm.training.freezing import part_of, set_trainable
from agevlm.training.losses import guidance_loss, in_mask_mass, pointing_accuracy
from agevlm.training.trainer import AgeVlmSFTTrainer
from builders import tiny_processor


def assert_same_tensors(first, second, **tolerance):
    assert first.keys() == second.keys()
    assert first
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def batch_of(kinds, model):
    """The labels, guided phrases and masks of one batch of `kinds`, and the model's output on it."""
    batch = AgeVlmDataCollator(tiny_processor(), max_length=1024)(list(make_rows(kinds)))
    guided, masks, labels = guided_phrases(batch), batch.pop("guidance_mask").flatten(2), batch.pop("labels")
    return labels, guided, masks, model(**batch)


def plain_objective(kinds=KINDS, weight=1.0, normalization="sum", loss="dice"):
    """Full logits, one batch: mean cross-entropy over answer tokens + weight x mean guidance over guided rows, of each
    the mean over its phrases.

    Returns the loss and its gradients.
    """
    model = sharp_model().train()
    set_trainable(model, ("projector", "cross_attention"))
    labels, guided, masks, output = batch_of(kinds, model)
    rows = []
    for row, phrases in enumerate(guided):
        if phrases.any():
            maps = output.cross_attention_maps[:, row, phrases]
            rows.append(guidance_loss(maps, masks[row, phrases], normalization, loss).mean())
    guidance = torch.stack(rows).mean()
    total = cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + weight * guidance
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- The objective ----


def test_weight_zero_is_stock_sft(tmp_path):
    """The same parameters, bit for bit, after 10 steps."""

    class WithoutGuidance(AgeVlmDataCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            return {name: value for name, value in batch.items() if not name.startswith("guidance")}

    model, processor = sharp_model(), tiny_processor()
    set_trainable(model, ("projector", "cross_attention"))
    stock = SFTTrainer(
        model=model,
        args=make_arguments(tmp_path / "stock", config=SFTConfig, max_steps=10),
        data_collator=WithoutGuidance(processor, max_length=1024),
        train_dataset=make_rows("8ii31iig"),  # stock SFT cannot train text rows through frozen weights
        processing_class=processor,
    )
    stock.train()
    ours = make_trainer(tmp_path / "ours", "8ii31iig", guidance_weight=0.0, max_steps=10)
    ours.train()

    before = dict(sharp_model().named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert_same_tensors(dict(ours.model.named_parameters()), dict(model.named_parameters()), atol=0, rtol=0)
    assert "guidance_loss" not in ours.state.log_history[0]


@pytest.mark.parametrize(
    ("kinds", "weight", "normalization", "loss"),
    [
        (KINDS, 1.0, "sum", "dice"),
        (PHRASES, 1.0, "sum", "dice"),
        (PHRASES, 0.3, "max", "dice"),
        (PHRASES, 1.0, "sum", "bce"),
        (PHRASES, 0.3, "sum", "kl"),
    ],
)
def test_gradients_are_those_of_the_plain_objective(tmp_path, kinds, weight, normalization, loss):
    settings = {"guidance_weight": weight, "guidance_normalization": normalization, "guidance_loss": loss}
    gradients = step_gradients(tmp_path, batch_size=8, kinds=kinds, **settings)
    _, reference = plain_objective(kinds, weight=weight, normalization=normalization, loss=loss)
    assert_same_tensors(gradients, reference, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("kinds", "batch_size", "settings"),
    [(KINDS, 1, {}), (PHRASES, 1, {}), (PHRASES, 2, {"logging_steps": 2}), (PHRASES, 4, {})],
)
def test_accumulated_batches_give_the_gradients_of_one_batch(tmp_path, kinds, batch_size, settings):
    """Some of the small batches have no guided row, some no picture at all; in a step that is not logged some ask for
    the mass."""
    divided = step_gradients(tmp_path, batch_size, accumulation=8 // batch_size, kinds=kinds, **settings)
    assert_same_tensors(divided, step_gradients(tmp_path, batch_size=8, kinds=kinds), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"logging_steps": 2}, {"logging_steps": 2, "activation_checkpointing": True}])
def test_mass_and_maps_give_the_same_gradients(tmp_path, settings):
    """A step that is not logged, of rows whose words are nearly all guided, asks for the mass."""
    maps = step_gradients(tmp_path / "maps", batch_size=8, kinds="81gg38gg")
    asked = []
    with patch.object(AgeVlmSFTTrainer, "_needs_mass_only", lambda *_: asked.append(True) or True):
        mass = step_gradients(tmp_path / "mass", batch_size=8, kinds="81gg38gg", **settings)
    assert asked
    assert_same_tensors(mass, maps, atol=1e-6, rtol=1e-4)


def test_one_listed_phrase_trains_as_one_mask(tmp_path):
    """The same parameters, bit for bit."""
    trained = []
    for kinds in ("ggiitggi", "11iit11i"):
        trainer = make_trainer(tmp_path / kinds, kinds, max_steps=4)
        trainer.train()
        trained.append(dict(trainer.model.named_parameters()))
    assert_same_tensors(*trained, atol=0, rtol=0)


def test_two_processes_give_the_gradients_of_one_batch(tmp_path):
    def steps() -> None:
        for kinds in TWO_PROCESS_KINDS:  # not logged: rows most of whose words are guided ask for the mass
            gradients = step_gradients(tmp_path, batch_size=1, accumulation=4, logging_steps=2, kinds=kinds)
            torch.save(gradients, tmp_path / f"{kinds}-{os.environ['RANK']}.pt")

    fork_ranks(steps)
    for kinds in TWO_PROCESS_KINDS:
        single = step_gradients(tmp_path, batch_size=8, kinds=kinds)
        for rank in range(2):
            assert_same_tensors(torch.load(tmp_path / f"{kinds}-{rank}.pt"), single, atol=1e-6, rtol=1e-4)


def test_a_step_of_text_alone_trains_nothing_but_runs(tmp_path):
    gradients = step_gradients(tmp_path, batch_size=1, accumulation=2, kinds="ttg")
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(("fsdp_size", "expected"), [(None, False), (1, False), (2, True)])
def test_where_the_model_was_loaded_in_shards_every_batch_has_pictures(tmp_path, fsdp_size, expected):
    """As `from_pretrained(distributed_config=DistributedConfig(fsdp_size=...))` leaves it."""
    model = sharp_model()
    model._fsdp_size = fsdp_size
    trainer = make_trainer(tmp_path, model=model)
    assert trainer.data_collator.always_pictures is expected
    text, whole = (trainer.data_collator(list(make_rows(kinds))) for kinds in ("tt", "tg"))
    assert ("pixel_values" in text) is expected and "pixel_values" in whole


def test_one_forward_pass_per_batch_and_no_logits(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    calls = {"backbone": 0, "head": 0}
    trainer.model.model.register_forward_hook(lambda *_: calls.update(backbone=calls["backbone"] + 1))
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.update(head=calls["head"] + 1))
    trainer.train()
    assert calls == {"backbone": 2, "head": 0}


def test_the_head_scores_answers_alone(tmp_path):
    """On a CPU too; a prediction, which also gives logits, scores every token."""
    trainer, states = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=8), []
    trainer.model.model.register_forward_hook(lambda _, args, output: states.append(output.last_hidden_state.shape))
    trainer.train()
    (batch,) = trainer.get_train_dataloader()
    assert states == [(1, int((batch["labels"] != -100).sum()), trainer.model.config.text_config.hidden_size)]
    states.clear()
    trainer.evaluate(make_rows(KINDS))
    assert all(shape[:2] == batch["input_ids"].shape for shape in states)


def test_second_forward_passes_of_trl_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor.*guidance_weight=0"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)


def test_guidance_stays_in_float32_under_bf16_autocast(tmp_path):
    maps = []
    trainer = make_trainer(tmp_path, max_steps=1, bf16=True, per_device_train_batch_size=8)
    trainer.model.model.register_forward_hook(lambda module, args, output: maps.append(output.cross_attention_maps))
    trainer.train()
    assert maps[0].dtype == torch.float32
    # in bfloat16 the sums would be off by some 1e-3
    guided = [index for index, kind in enumerate(KINDS) if kind == "g"]
    torch.testing.assert_close(maps[0].sum(dim=-1)[:, guided, 0], torch.ones(2, len(guided)), atol=1e-6, rtol=0)
    assert trainer.state.log_history[0]["guidance_loss"] > 0


def test_a_released_model_is_like_new(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    trainer.release_model()
    trainer.model.eval()
    output, expected = batch_of("gi", trainer.model)[-1], batch_of("gi", sharp_model())[-1]
    torch.testing.assert_close(output.logits, expected.logits, atol=0, rtol=0)
    assert "forward" not in trainer.model.__dict__
    assert not trainer.model.model._forward_hooks


def test_rows_that_cannot_be_guided_do_not_count():
    """Row 1: the query was cut off. Row 2: the mask is empty. Row 3: the query comes before the picture."""
    batch = {
        "input_ids": torch.zeros(4, 2),
        "guidance_mask": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])[:, None, None],
        "guidance_query_mask": torch.tensor([[False, True], [False, False], [True, True], [True, False]])[:, None],
        "cross_attention_mask": torch.tensor([[[False], [True]]] * 4),
    }
    assert guided_phrases(batch).tolist() == [[True], [False], [False], [False]]
    assert guided_phrases({"input_ids": torch.zeros(3, 2)}).tolist() == [[False], [False], [False]]


# ---- Metrics ----


METRIC_KINDS = "3t8iitig"


def expected_metrics(model):
    """Of `METRIC_KINDS`: averages over guided rows of averages over their phrases."""
    _, guided, masks, output = batch_of(METRIC_KINDS, model)
    maps, rows = output.cross_attention_maps, guided.any(1).nonzero().flatten().tolist()
    metrics = {"guidance_loss": guidance_loss, "in_mask_mass": in_mask_mass, "pointing_accuracy": pointing_accuracy}
    averages = {
        name: sum(metric(maps[:, row, guided[row]], masks[row, guided[row]]).mean().item() for row in rows) / len(rows)
        for name, metric in metrics.items()
    }
    return {**averages, "guided_share": len(rows) / len(guided)}


def test_training_metrics_are_averages_over_rows_not_batches(tmp_path):
    """8 rows in batches of 3, 3 and 2 with 2, 0 and 1 guided rows; the weights do not move."""
    trainer = make_trainer(
        tmp_path, METRIC_KINDS, per_device_train_batch_size=3, logging_steps=3, max_steps=3, learning_rate=0.0
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    for name, value in expected_metrics(sharp_model()).items():
        assert logged[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_logged_loss_is_the_plain_objective(tmp_path, accumulation):
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(tmp_path, guidance_weight=0.3, max_steps=1, learning_rate=0.0, **batches)
    trainer.train()
    expected, _ = plain_objective(weight=0.3)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    metrics = make_trainer(tmp_path, guidance_weight=0.3, per_device_eval_batch_size=8).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_evaluation_measures_guidance_at_any_weight(tmp_path, weight):
    trainer = make_trainer(tmp_path, METRIC_KINDS, per_device_eval_batch_size=3, guidance_weight=weight)
    metrics = trainer.evaluate()
    for name, value in expected_metrics(sharp_model()).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("kinds", ["gi", KINDS])
def test_a_prediction_changes_no_later_evaluation(tmp_path, kinds):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    noise = ("runtime", "per_second")
    first, second = [], []
    for found in (first, second):
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if not any(part in name for part in noise)})
        trainer.predict(make_rows(kinds))
    assert first == second and "eval_in_mask_mass" in first[0] and "eval_mean_token_accuracy" in first[0]


def test_a_window_without_guided_rows_logs_a_share_of_zero_and_no_loss(tmp_path):
    trainer = make_trainer(tmp_path, "itgi", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["guided_share"] == 0
    assert "guidance_loss" not in trainer.state.log_history[0]


# ---- Optimizer and arguments ----


def test_parts_have_their_own_learning_rates(tmp_path):
    trainer = make_trainer(
        tmp_path,
        parts=("projector", "cross_attention", "vision_all", "language_model"),
        learning_rate=1e-3,
        projector_learning_rate=2e-3,
        vision_learning_rate=0.0,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_steps=1,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    stock = make_trainer(tmp_path, parts=("projector", "cross_attention", "vision_all", "language_model"))
    decayed = stock.get_decay_parameter_names(stock.model)
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {"projector": 2e-3, "vision": 0.0, "cross_attention": 1e-3, "language_model": 1e-3}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["lr"] == rates[part_of(name)], name
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
    assert seen == set(before)
    for name, parameter in trainer.model.named_parameters():
        if part_of(name) == "vision":
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_normalization": "softmax"}, "one of sum, max, got 'softmax'"),
        ({"guidance_loss": "iou"}, "one of dice, bce, kl, got 'iou'"),
        ({"guidance_loss": "kl", "guidance_normalization": "max"}, "'kl' compares distributions"),
        ({"guidance_weight": -1.0}, "must be 0 .off. or positive, got -1.0"),
        ({"vision_learning_rate": -1e-3}, "`vision_learning_rate` must not be negative"),
        ({"use_liger_kernel": True}, "no kernels for this one"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must stay False"),
        ({"hub_strategy": "every_save"}, "`hub_strategy` must stay 'end', got 'every_save'"),
        ({"assistant_only_loss": False}, "`assistant_only_loss` must stay True"),
        ({"completion_only_loss": True}, "`completion_only_loss` off"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **arguments)


@pytest.mark.parametrize("rows", ["no row has one", "no column"])
def test_guidance_without_a_mask_is_refused(tmp_path, rows):
    without = make_rows("iit") if rows == "no row has one" else make_rows("iit").remove_columns("guidance")
    common = {"model": sharp_model(), "train_dataset": without, "processing_class": tiny_processor()}
    with pytest.raises(
        ValueError, match=r"none of the 3 rows brings a mask.*agevlm data import.*--masks.*ca-baseline"
    ):
        AgeVlmSFTTrainer(args=make_arguments(tmp_path), **common)
    AgeVlmSFTTrainer(args=make_arguments(tmp_path, guidance_weight=0.0), **common)


def test_the_obvious_script_is_guided(tmp_path):
    """No collator is given: the trainer makes its own, and all rows with a mask are guided."""
    trainer = AgeVlmSFTTrainer(
        model=sharp_model(),
        args=make_arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=8, pad_to_multiple_of=16, max_length=512
        ),
        train_dataset=make_rows("gigigigi"),
        processing_class=tiny_processor(),
    )
    assert type(trainer.data_collator) is AgeVlmDataCollator
    assert (trainer.data_collator.max_length, trainer.data_collator.pad_to_multiple_of) == (512, 16)
    trainer.train()
    assert trainer.state.log_history[0]["guided_share"] == 0.5


def test_collators_keep_guidance_and_the_length(tmp_path):
    processor = tiny_processor()
    common = {"model": sharp_model(), "train_dataset": make_rows("gi"), "processing_class": processor}
    with pytest.raises(ValueError, match="`data_collator` is a function, which leaves guidance out"):
        AgeVlmSFTTrainer(args=make_arguments(tmp_path), data_collator=lambda rows: rows, **common)
    with pytest.raises(ValueError, match="`processing_class` must be the model's AgeVlmProcessor, got NoneType"):
        AgeVlmSFTTrainer(args=make_arguments(tmp_path), **{**common, "processing_class": None})
    for given, kept in ((None, 77), (50, 50)):
        collator = AgeVlmDataCollator(processor, max_length=given)
        trainer = AgeVlmSFTTrainer(args=make_arguments(tmp_path, max_length=77), data_collator=collator, **common)
        assert trainer.data_collator is collator and collator.max_length == kept
        trainer.release_model()


def test_lora_adapters_are_guided(tmp_path):
    """The maps come from the backbone inside PEFT's wrapper."""
    model = get_peft_model(sharp_model(), LoraConfig(target_modules=r".*cross_attn\.(q|k)_proj", r=2))
    processor = tiny_processor()
    trainer = AgeVlmSFTTrainer(
        model=model,
        args=make_arguments(tmp_path, max_steps=2, per_device_train_batch_size=8),
        data_collator=AgeVlmDataCollator(processor, max_length=1024),
        train_dataset=make_rows("g" * 8),
        processing_class=processor,
    )
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert second["guidance_loss"] < first["guidance_loss"]
