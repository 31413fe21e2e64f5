"""Tensor-parallel and FSDP plans on two processes, and `device_map`, against the model in one piece."""

import parallel_worker
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from workers import fork_ranks

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from builders import tiny_batch, tiny_model


def whole_step(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    return output.logits.detach(), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def normed_model():
    """With norms on queries and keys, whose gradients are partial on each process of tensor parallelism."""
    model = tiny_model(cross_attention_gate="tanh", cross_attention_qk_norm=True)
    for block in model.model.language_model.cross_attention_layers:
        torch.nn.init.ones_(block.attn_gate)
        torch.nn.init.ones_(block.mlp_gate)
    return model


TEXT = {"input_ids": torch.randint(20, 200, (3, 10), generator=torch.Generator().manual_seed(2))}
BLANK = {"pixel_values": torch.zeros(3, 1, 3, 96, 96), "image_mask": torch.zeros(3, 1, dtype=torch.bool)}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> dict[str, list[dict]]:
    """What both processes got by either plan, all from one start of them."""
    folder = tmp_path_factory.mktemp("parallel")
    for kind, model in (("tp", normed_model()), ("fsdp", tiny_model())):
        model.save_pretrained(folder / kind)
        pictures = tiny_batch(model)
        torch.save([pictures, pictures if kind == "tp" else {**TEXT, **BLANK}], folder / kind / "batches.pt")
    fork_ranks(lambda: parallel_worker.run(folder))
    return {kind: [torch.load(folder / kind / f"rank-{rank}.pt") for rank in range(2)] for kind in ("tp", "fsdp")}


def test_tensor_parallel_equals_one_process(sharded):
    model = normed_model()
    logits, gradients = whole_step(model, tiny_batch(model))
    for result in sharded["tp"]:
        assert torch.allclose(result["logits"], logits, atol=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(result["gradients"][name], gradient, atol=1e-5), name
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert f"model.language_model.cross_attention_layers.0.cross_attn.{projection}.weight" in result["sharded"]
        assert "all 4 heads; under tensor parallelism this process has 2" in result["refusal"]


def test_fsdp_equals_one_process_with_a_batch_of_text_on_one_rank(sharded):
    """A rank without pictures takes a blank one that no row has, so that all ranks gather the same parameters. Its
    logits and gradients are those of the text alone."""
    model = tiny_model()
    steps = [whole_step(model, batch) for batch in (tiny_batch(model), TEXT)]
    for (logits, _), result in zip(steps, sharded["fsdp"], strict=True):
        assert torch.allclose(result["logits"], logits, atol=1e-5)
        assert result["sharded"] == {name for name, _ in model.named_parameters()}
        assert not result["refusal"]
        for name, gradient in steps[0][1].items():
            assert torch.allclose(result["gradients"][name], (gradient + steps[1][1][name]) / 2, atol=1e-5), name


def test_the_plans_name_modules_that_exist(model):
    """A rule that matches nothing is only a warning in transformers, and the module it meant stays whole."""
    names = {name for name, _ in model.named_modules()}
    wildcards = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    ours = [
        name for name in (*model.tp_plan, *model.fsdp_plan) if "cross_attention" in name or "encoder.stages" in name
    ]
    assert len(ours) == 11
    assert set(ours) <= wildcards
    models = (model, tiny_model(cross_attention_position="after_self_attention"))
    classes = {type(module).__name__ for each in models for module in each.modules()}
    assert set(model._no_split_modules) <= classes


def test_a_model_split_by_device_map_equals_the_whole(model, tmp_path):
    """Cut by `_no_split_modules`. The second device is the disk: a machine without an accelerator has no other."""
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    for share in (0.3, 0.8):
        loaded = AgeVlmForConditionalGeneration.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=tmp_path / "offloaded"
        )
        assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
        whole = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
        for name in loaded.hf_device_map:
            assert not any(name.startswith(f"{parent}.") for parent in whole)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, expected)
        assert torch.equal(loaded.generate(**batch, max_new_tokens=4, do_sample=False), answers)


def test_blocks_on_a_second_device_get_all_their_inputs(model):
    """What `device_map` does on two accelerators. The second device is `meta`: it has shapes without numbers, and
    refuses tensors of other devices as any device does."""
    batch = tiny_batch(model)
    query = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    stack = model.model.language_model
    for module in (*stack.layers[2:], stack.cross_attention_layers[1], stack.norm, model.lm_head):
        add_hook_to_module(module.to("meta"), AlignDevicesHook("meta"))
    with torch.no_grad():
        output = model(**batch, guidance_query_mask=query)
        mass = model(**batch, guidance_query_mask=query, guidance_mask=torch.ones(3, 18)).cross_attention_mass
    assert output.logits.is_meta and output.logits.shape == (3, 10, model.config.text_config.vocab_size)
    assert output.cross_attention_maps.shape == (2, 3, 18)
    assert mass.shape == (2, 3)
