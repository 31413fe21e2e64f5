"""What transformers' common tests ask of a VLM, for machines that do not have their sources (tests/upstream).

What the other files here test already (saving, checkpointing, caches, padding) is not repeated.
"""

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, StaticCache, TorchAoConfig

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from builders import tiny_batch, tiny_model


@pytest.fixture
def batch(model):
    return tiny_batch(model)


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_or_not_saved_and_resized(tmp_path, tied):
    model = tiny_model(text_config={"tie_word_embeddings": tied})
    batch = tiny_batch(model)
    before = logits(model, **batch)
    vocabulary = model.config.text_config.vocab_size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.resize_token_embeddings(vocabulary + 10)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert loaded.config.text_config.vocab_size == vocabulary + 10
    after = logits(loaded, **batch)
    assert after.shape[-1] == vocabulary + 10
    assert torch.allclose(after[..., :vocabulary], before, atol=1e-6)


def test_hidden_states_and_attentions_are_recorded_at_every_step(model, batch):
    model.set_attn_implementation("eager")
    inputs = {**batch, "output_hidden_states": True, "output_attentions": True}
    output = model(**inputs)
    assert [state.shape for state in output.hidden_states] == [(3, 10, 32)] * 5
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    steps = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert [step[0].shape for step in steps.attentions] == [(3, 4, 10, 10), (3, 4, 1, 11), (3, 4, 1, 12)]
    # generate of a decoder-only model hands on what it knows by name; the weights over pictures come from forward
    assert model(**inputs, return_dict=False)[-2][0].shape == (3, 4, 10, 18)
    for weights in output.cross_attentions:
        assert torch.allclose(weights[2, :, 5:].sum(-1), torch.ones(4, 5))


def test_num_items_in_batch_is_the_divisor_of_the_loss(model, batch):
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    mean = model(**batch, labels=labels).loss
    divided = model(**batch, labels=labels, num_items_in_batch=torch.tensor(72)).loss
    assert torch.allclose(divided, mean * (3 * 6) / 72)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    assert torch.allclose(model(**batch, labels=labels, shift_labels=shifted).loss, mean)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flex_attention_equals_eager(model, batch, compiled):
    """Uncompiled, flex attention runs the same mask functions in plain torch. It has no backward pass on a CPU."""
    batch["attention_mask"][1, :3] = 0
    model.set_attn_implementation("eager")
    expected = logits(model, **batch)
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("flex_attention")
    seen = batch["attention_mask"].bool()
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        assert torch.allclose(logits(model, **batch)[seen], expected[seen], atol=1e-5)
        if not compiled:
            assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), answers)


def test_flash_attention_is_refused(model):
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        model.set_attn_implementation("flash_attention_2")


def test_forward_is_one_graph(model, batch):
    """`test_guidance.py` compiles a guided step, without the head."""
    expected = model(**batch, labels=batch["input_ids"])
    torch.compiler.reset()
    output = torch.compile(model.forward, fullgraph=True, backend="eager")(**batch, labels=batch["input_ids"])
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    assert torch.allclose(output.loss, expected.loss, atol=1e-5)


def test_decode_steps_over_a_static_cache_are_one_graph(model, batch):
    """No graph break and no second compilation, as transformers' common tests ask of `generate`."""
    expected = model.generate(
        **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    cache = StaticCache(config=model.config, max_cache_len=16)
    placeholders = batch["input_ids"] == model.config.image_token_id
    inputs = {
        "cache": cache,
        "cross_attention_mask": placeholders.cumsum(-1)[..., None] > torch.arange(2),
        "image_mask": batch["image_mask"],
        "visual_token_mask": batch["visual_token_mask"],
    }
    torch.compiler.reset()
    decode = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], **inputs)
        for step in range(5):
            token = expected.sequences[:, 10 + step, None]
            positions = torch.full((3, 1), 10 + step)
            if step < 2:  # the first may specialise on the length of the prompt
                output = decode(input_ids=token, position_ids=positions, **inputs)
            else:
                with torch._dynamo.config.patch(error_on_recompile=True):
                    output = decode(input_ids=token, position_ids=positions, **inputs)
            assert torch.allclose(output.logits[:, 0], expected.logits[step + 1], atol=1e-5)


def test_lora_keeps_projector_and_cross_blocks(model, batch, tmp_path):
    blocks = [f"cross_attention_layers.{index}" for index in range(2)]
    config = LoraConfig(
        target_modules=r".*language_model\.layers\..*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector", *blocks],
        task_type="CAUSAL_LM",
    )
    before = logits(model, **batch)
    adapted = get_peft_model(model, config)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for part in ("lora_A", "multi_modal_projector", *blocks):
        assert any(part in name for name in trained), part
    assert not any("vision_tower" in name or "embed_tokens" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves only lora_B: lora_A's gradient goes through it
        optimizer.zero_grad()
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    after = logits(adapted, **batch)
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path).eval(), **batch), after)
    assert torch.allclose(logits(adapted.merge_and_unload(), **batch), after, atol=1e-5)


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_quantised_loading_stays_close(tmp_path, kind):
    """The decoder's linear layers, cross blocks included; the head is not. Tower and projector are left out of 4 bits,
    whose kernels on a CPU need widths in multiples of 64."""
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"`{kind}` is not installed")
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
    model = tiny_model(text_config={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    batch = tiny_batch(model)
    expected = logits(model, **batch)
    model.save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    block = loaded.model.language_model.cross_attention_layers[0]
    for layer in (block.cross_attn.o_proj, block.mlp.down_proj, loaded.model.language_model.layers[0].mlp.up_proj):
        assert type(layer.weight) is not torch.nn.Parameter
    assert type(loaded.lm_head.weight) is torch.nn.Parameter
    similarity = torch.nn.functional.cosine_similarity(logits(loaded, **batch), expected, dim=-1)
    assert similarity.mean() > (0.999 if kind == "torchao" else 0.9), similarity  # 4 bits cost random weights most
    assert loaded.generate(**batch, max_new_tokens=3, do_sample=False).shape == (3, 13)


def test_bfloat16_survives_saving_and_pictures_are_cast(model, batch, tmp_path):
    expected = logits(model, **batch)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert batch["pixel_values"].dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(logits(loaded, **batch).float(), expected, dim=-1)
    assert similarity.min() > 0.999
