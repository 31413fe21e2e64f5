"""Adapters in stage 4: what trains, that the finished folder is a whole model, and that a killed run goes on."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from training_worker import CountSteps, Stop, StopAt, make_rows, quick
from transformers import AutoModel
from workers import same_weights

from agevlm.training.adapters import AdapterArguments
from agevlm.training.freezing import part_of
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align, stage4_instruct
from agevlm.training.stages.recipe import StageRecipe
from agevlm.training.train import parse
from builders import save_tiny, tiny_model


FLAGS = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}


def small_recipe(**changes) -> StageRecipe:
    recipe = stage4_instruct.recipe(size="tiny", variant="agevlm-lm")
    changes = {"save_steps": 2, "logging_steps": 1, "max_steps": 4, **changes}
    return quick(recipe, learning_rate=1e-2, **changes)


@pytest.fixture
def start(tmp_path):
    return save_tiny(tmp_path / "start")


def run_adapters(start, output_dir, flags=FLAGS, callbacks=(), **changes):
    recipe = small_recipe(**changes)
    adapters = AdapterArguments(**flags)
    return run_stage(
        recipe, output_dir, data=make_rows("gt"), init_from=start, adapters=adapters, callbacks=list(callbacks)
    )


def test_the_finished_folder_is_a_whole_model_with_the_adapters_merged(start, tmp_path):
    result = run_adapters(start, tmp_path / "run")  # on the same two rows in every step
    assert result.log_history[-2]["loss"] < result.log_history[0]["loss"]
    assert result.log_history[0]["guidance_loss"] > 0
    model, loading = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=True, output_loading_info=True)
    assert not any(loading.values())
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {name for name in before if ".language_model.layers." in name and name.endswith("_proj.weight")}
    whole = {name for name in before if part_of(name) in ("projector", "cross_attention")}
    assert moved == linear | whole
    assert not (tmp_path / "run" / "adapter_config.json").exists()

    # the last checkpoint, its adapters beside the weights, computes the same
    from peft import PeftModel

    assert (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").exists()
    adapted = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "checkpoint-4").eval()
    text = torch.arange(20, 30)[None]
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, adapted(**batch).logits, atol=1e-4, rtol=1e-4)


def test_a_stopped_run_goes_on_to_the_weights_of_a_whole_one(start, tmp_path):
    run_adapters(start, tmp_path / "whole")
    with pytest.raises(Stop):
        run_adapters(start, tmp_path / "run", callbacks=[StopAt(3)])
    count = CountSteps()
    run_adapters(start, tmp_path / "run", callbacks=[count])
    assert count.steps == 2
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_other_adapters_are_another_recipe(start, tmp_path):
    run_adapters(start, tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match=r"adapters\.r: 4 there, 8 asked"):
        run_adapters(start, tmp_path / "run", {**FLAGS, "lora_r": 8}, max_steps=1)
    identity = json.loads((tmp_path / "run" / "agevlm_stage.json").read_text())["recipe"]
    assert identity["adapters"]["load_in_4bit"] is False


def test_frozen_self_attention_gets_no_adapters():
    config = tiny_model().config
    assert "self_attn" in AdapterArguments(use_peft=True).lora(config).target_modules
    assert "self_attn" not in AdapterArguments(use_peft=True).lora(config, ("self_attention",)).target_modules
    assert AdapterArguments().lora(config) is None


def test_a_dry_run_counts_adapters(tmp_path, capsys):
    from agevlm.training.train import main

    main(["stage4_instruct", "--use_peft", "--dry_run", "--output_dir", str(tmp_path / "never")])
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    # rank 16 on 2048 -> 2048, 512, 512, 2048 (attention), 2 x 8192 (up and gate) and back, in 16 layers
    attention = 16 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 512))
    ffn = 16 * 16 * 3 * (2048 + 8192)
    assert f"LLM self-attention {167_804_928 + attention:,} {attention:,}" in lines
    assert f"LLM FFN {805_339_136 + ffn:,} {ffn:,}" in lines
    assert "cross-attention blocks 243,286,016 243,286,016" in lines
    assert "vision stage 4 61,612,032 frozen" in lines


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (4, {"load_in_4bit": True}, "`--load_in_4bit` needs `--use_peft`"),
        (1, {"use_peft": True}, "stage1_align keeps the language model frozen"),
        (4, {"attn_implementation": "flash_attention_2"}, "padded cells of pictures need one"),
        (4, {"model_name_or_path": "x"}, "Use `--init_from`"),
        (4, {"use_peft": True, "load_in_8bit": True}, "`--load_in_8bit` needs `--init_from`"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, stage, flags, message):
    recipe = {1: stage1_align, 4: stage4_instruct}[stage].recipe("tiny")
    with pytest.raises(ValueError, match=message):
        run_stage(recipe, tmp_path / "run", adapters=AdapterArguments(**flags))
    assert not (tmp_path / "run").exists()


def test_adapters_under_sharding_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="does not go with FSDP or DeepSpeed"):
        run_stage(small_recipe(), tmp_path / "run", adapters=AdapterArguments(use_peft=True))


def test_without_bitsandbytes_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    adapters = AdapterArguments(use_peft=True, load_in_4bit=True)
    with pytest.raises(ValueError, match="`--load_in_4bit` needs bitsandbytes"):
        run_stage(small_recipe(), tmp_path / "run", init_from="anything", adapters=adapters)


def test_the_command_line_has_trls_flags():
    *_, adapters = parse(["stage4_instruct", "--use_peft", "--lora_r", "8", "--load_in_4bit"])
    assert (adapters.use_peft, adapters.lora_r, adapters.load_in_4bit) == (True, 8, True)


def test_trained_embeddings_are_tied_nowhere(start, tmp_path):
    flags = {**FLAGS, "lora_modules_to_save": ["embed_tokens", "multi_modal_projector"]}
    run_adapters(start, tmp_path / "run", flags, max_steps=2)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "run" / "model.safetensors")
    (embeddings,) = (value for name, value in weights.items() if "embed_tokens" in name)
    assert not torch.equal(embeddings, weights["lm_head.weight"])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantized_training_merges_into_full_precision(start, tmp_path):
    result = run_adapters(start, tmp_path / "run", {**FLAGS, "load_in_4bit": True})
    assert result.log_history[-2]["loss"] < result.log_history[0]["loss"]
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert "quantization_config" not in json.loads((tmp_path / "run" / "config.json").read_text())
    frozen = [name for name in before if part_of(name) == "vision" or "embed_tokens" in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=True)
