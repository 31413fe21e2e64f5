"""The model against what it must equal: stock Llama, its own eager path, itself without a cache."""

import contextlib
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

from agevlm.conversion.assemble import assemble, spread_cross_attention_layers
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from builders import tiny_batch, tiny_model


LENGTH, CELLS = 10, 9


def stock_llama(model) -> LlamaForCausalLM:
    """The Llama inside `model`, loaded under Llama's own key names."""
    llama = LlamaForCausalLM(model.config.text_config).eval()
    llama.model.load_state_dict(
        {k: v for k, v in model.model.language_model.state_dict().items() if "cross_attention_layers" not in k}
    )
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama


@pytest.fixture(params=["after_layer", "after_self_attention"])
def position(request):
    """Where a cross block stands: nothing else about it changes."""
    return request.param


@pytest.fixture
def model(position):
    return tiny_model(cross_attention_position=position)


@pytest.fixture
def batch(model):
    return tiny_batch(model)


@pytest.fixture
def query_mask():
    mask = torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[0, 3:6] = mask[2, 4:8] = True
    return mask


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_text_only_logits_equal_stock_llama_bit_for_bit(model, batch, implementation):
    llama = stock_llama(model)
    model.set_attn_implementation(implementation)
    llama.set_attn_implementation(implementation)
    ids = batch["input_ids"]
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    for attention_mask in (None, padded):
        kwargs = {"input_ids": ids, "attention_mask": attention_mask}
        assert torch.equal(logits(model, **kwargs), logits(llama, **kwargs))


@pytest.mark.parametrize("settings", [{}, {"cross_attention_gate": "tanh", "cross_attention_qk_norm": True}], ids=str)
def test_closed_cross_blocks_leave_the_llama_unchanged(batch, position, settings):
    """By a projection of zeros, or by the gates of Mllama's preset."""
    model = tiny_model(open_cross_blocks=False, cross_attention_position=position, **settings)
    text = logits(stock_llama(model), input_ids=batch["input_ids"])
    assert torch.equal(logits(model, **batch), text)
    with torch.no_grad():
        for block in model.model.language_model.cross_attention_layers:
            opened = block.attn_gate if settings else block.cross_attn.o_proj.weight
            opened.fill_(1.0)
    assert not torch.equal(logits(model, **batch)[0], text[0])


def test_rows_without_pictures_and_tokens_before_a_picture_get_exactly_nothing(model, batch):
    mixed, text = logits(model, **batch), logits(stock_llama(model), input_ids=batch["input_ids"])
    assert torch.equal(mixed[1], text[1])
    assert torch.equal(mixed[0, :2], text[0, :2])
    assert torch.equal(mixed[2, :1], text[2, :1])
    assert (mixed[0, 2:] - text[0, 2:]).abs().amax(-1).min() > 1e-3  # from the placeholder on, the picture is seen


def test_pictures_that_do_not_exist_and_padded_cells_leave_no_trace(model, batch):
    expected = logits(model, **batch)
    pixels = batch["pixel_values"].clone()
    pixels[1] = 50.0
    pixels[0, 1] = -50.0
    assert torch.equal(logits(model, **{**batch, "pixel_values": pixels}), expected)
    features = model.model.get_image_features(batch["pixel_values"].flatten(0, 1)).pooler_output
    changed = features.clone().view(3, 2, CELLS, -1)
    changed[0, 0, :3] += 10.0
    model.model.get_image_features = lambda *args, **kwargs: type("O", (), {"pooler_output": changed.flatten(0, 1)})
    assert torch.allclose(logits(model, **batch), expected, atol=1e-6)


def test_a_row_in_a_batch_equals_the_row_alone(model, batch):
    together = logits(model, **batch)
    for index, images in ((0, 1), (2, 2)):
        alone = {name: value[index : index + 1] for name, value in batch.items()}
        for name in ("pixel_values", "image_mask", "visual_token_mask"):
            alone[name] = alone[name][:, :images]
        assert torch.allclose(logits(model, **alone)[0], together[index], atol=1e-5)


def test_a_token_sees_the_images_before_it_and_no_later_ones(model, batch):
    pixels = batch["pixel_values"].clone()
    pixels[2, 1] = torch.randn(3, 96, 96)
    change = (logits(model, **{**batch, "pixel_values": pixels}) - logits(model, **batch)).abs().amax(-1)
    assert change[2, :5].max() == 0
    assert change[2, 5:].min() > 0
    assert change[:2].max() == 0


def test_explicit_cross_attention_mask_equals_the_default(model, batch):
    ids = batch["input_ids"] == model.config.image_token_id
    mask = ids.cumsum(-1)[..., None] > torch.arange(2)
    assert torch.equal(logits(model, **batch, cross_attention_mask=mask), logits(model, **batch))


@pytest.mark.parametrize("case", ["mixed", "unpadded"])
def test_eager_equals_sdpa(batch, position, case, query_mask):
    """`unpadded` runs SDPA without any mask: the case in which it would silently turn causal."""
    results = {}
    for implementation in ("eager", "sdpa"):
        model = tiny_model(cross_attention_position=position)
        model.set_attn_implementation(implementation)
        inputs = dict(batch)
        if case == "unpadded":
            inputs = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:1, :1]}
        output = model(
            **inputs, guidance_query_mask=query_mask[: len(inputs["input_ids"])], labels=inputs["input_ids"]
        )
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results[implementation] = (output.logits, output.cross_attention_maps, *gradients)
    for eager, sdpa in zip(*results.values(), strict=True):
        assert torch.allclose(eager, sdpa, atol=2e-5)


def test_maps_are_the_mean_of_the_eager_weights_with_the_same_gradients(batch, position, query_mask):
    model = tiny_model(cross_attention_position=position).double()
    model.set_attn_implementation("eager")
    inputs = {**batch, "pixel_values": batch["pixel_values"].double()}
    output = model(**inputs, guidance_query_mask=query_mask, output_attentions=True)
    assert [a.shape for a in output.attentions] == [(3, 4, LENGTH, LENGTH)] * 4
    assert [a.shape for a in output.cross_attentions] == [(3, 4, LENGTH, 2 * CELLS)] * 2
    reference = torch.zeros(2, 3, 2 * CELLS, dtype=torch.float64)
    for layer, weights in enumerate(output.cross_attentions):
        for row in (0, 2):
            reference[layer, row] = weights[row][:, query_mask[row]].mean((0, 1))
    maps = output.cross_attention_maps
    assert maps.dtype == torch.float32
    assert torch.allclose(maps.double(), reference, atol=1e-6)
    assert torch.allclose(maps.sum(-1), torch.tensor([1.0, 0.0, 1.0]).expand(2, 3), atol=1e-6)
    assert maps[:, 0, :3].abs().max() == 0  # padded cells

    weight = torch.randn(maps.shape, dtype=torch.float64)
    parameters = [p for n, p in model.named_parameters() if "q_proj" in n or "k_proj" in n or "linear_1" in n]
    ours = torch.autograd.grad((maps * weight).sum(), parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad((reference * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, atol=1e-5)


def test_query_tokens_that_see_no_picture_are_left_out_of_the_map(model, batch):
    mask = torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[:, :4] = True  # row 1 sees nothing, rows 0 and 2 only from their placeholder on
    seeing = mask.clone()
    seeing[0, :2] = seeing[2, :1] = False
    with torch.no_grad():
        first = model(**batch, guidance_query_mask=mask).cross_attention_maps
        second = model(**batch, guidance_query_mask=seeing).cross_attention_maps
    assert torch.equal(first, second)
    assert first[:, 1].abs().max() == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("field", ["cross_attention_maps", "cross_attention_mass"])
def test_gradient_checkpointing_changes_no_gradient(batch, position, reentrant, field):
    """Guided by 8 phrases and by 3."""
    generator = torch.Generator().manual_seed(0)
    guidance = {"guidance_query_mask": torch.rand(3, 8, LENGTH, generator=generator) < 0.5}
    guidance["guidance_query_mask"][2, 3:] = False
    if field == "cross_attention_mass":
        guidance["guidance_mask"] = torch.rand(3, 8, 2 * CELLS, generator=generator) < 0.5
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(cross_attention_position=position).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        output = model(**batch, **guidance, labels=batch["input_ids"], use_cache=False)
        (output.loss + output[field].square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def generate(model, batch, **kwargs):
    return model.generate(**batch, max_new_tokens=8, do_sample=False, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"cache_implementation": "static"}, {"cache": DynamicCache}], ids=["static", "own cache"]
)
def test_every_cache_generates_what_no_cache_generates(model, batch, kwargs):
    kwargs = {name: value() if callable(value) else value for name, value in kwargs.items()}
    assert torch.equal(generate(model, batch, **kwargs), generate(model, batch, use_cache=False))


def test_a_cache_that_was_reset_holds_no_pictures(model, batch):
    """Whoever takes one cache for everything resets it; the next text must not find the last pictures."""
    pictures = {name: value[:1] for name, value in batch.items()}
    text = {"input_ids": batch["input_ids"][1:2]}
    for cache in (StaticCache(config=model.config, max_cache_len=16), DynamicCache(config=model.config)):
        for inputs in (pictures, text, pictures):
            with_cache = logits(model, **inputs, cache=cache, use_cache=True)
            assert torch.allclose(with_cache, logits(model, **inputs), atol=1e-5)
            cache.reset()


def test_an_offloaded_cache_brings_every_layer_back_before_it_is_used(model, batch, monkeypatch):
    """Without an accelerator a layer that is away is only marked so, by what would have moved it."""

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    def offload(layer):
        layer.away = True

    def prefetch(layer):
        layer.away = False

    def update(layer, *args, **kwargs):
        assert not getattr(layer, "away", False)
        return grow(layer, *args, **kwargs)

    grow = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", update)
    monkeypatch.setattr(DynamicLayer, "offload", offload)
    monkeypatch.setattr(DynamicLayer, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    cache = DynamicCache(config=model.config, offloading=True)
    assert torch.equal(generate(model, batch, cache=cache), generate(model, batch, use_cache=False))
    away = [getattr(layer, "away", False) for layer in cache.layers]
    assert away == [False, True, True, True, False, False]  # the first is fetched for the next step


def test_inputs_embeds_and_logits_to_keep(model, batch):
    mask = (batch["input_ids"] == model.config.image_token_id).cumsum(-1)[..., None] > torch.arange(2)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    inputs = {k: v for k, v in batch.items() if k != "input_ids"}
    whole = logits(model, **batch)
    assert torch.equal(logits(model, **inputs, inputs_embeds=embeds, cross_attention_mask=mask), whole)
    assert torch.equal(logits(model, **batch, logits_to_keep=2), whole[:, -2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(2, 1, 3, 96, 96)}, "2 rows and the text 3"),
        ({"image_mask": torch.ones(3, 3)}, "`image_mask` has shape"),
        ({"image_mask": torch.ones(3, 2)}, "placeholders"),
        ({"visual_token_mask": torch.ones(3, 2, 4)}, "`visual_token_mask` has shape"),
        ({"cross_attention_mask": torch.ones(3, LENGTH, 1)}, "`cross_attention_mask` has shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_auto_classes_give_the_model_with_its_head_and_the_backbone_loads_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = type(model.model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(backbone[name], value) for name, value in model.model.state_dict().items())
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, AgeVlmForConditionalGeneration)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_paper_sizes():
    """Section 4 and reference counts: 16 + 4 layers, 576 visual tokens of width 1536 from 768 pixels."""
    config = AgeVlmConfig.paper()
    assert config.cross_attention_schedule == [2, 6, 10, 14]
    assert spread_cross_attention_layers(16) == [2, 7, 12, 17]
    with torch.device("meta"):
        model = AgeVlmForConditionalGeneration(config)
        features = model.model.vision_tower(torch.zeros(1, 3, 768, 768))
    assert features.last_hidden_state.shape == (1, 576, 1536)

    def millions(module):
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 1)

    cross = model.model.language_model.cross_attention_layers
    assert millions(model.model.vision_tower) == 196.2
    assert millions(model.model.multi_modal_projector) == 7.3
    assert round(millions(model.model.language_model) - millions(cross), 1) == 1235.8
    assert millions(cross) == 243.3


def test_a_block_stands_where_its_position_says(model, position):
    """Eqs. 1 and 2 written out in float64, with every cell visible. `after_self_attention` is the text of section
    3.2.1: Llama's own MLP comes after the cross block."""
    model = model.double()
    decoder = model.model.language_model
    ids = torch.tensor([[model.config.image_token_id, 30, 40, 50]])
    pixels = torch.randn(1, 1, 3, 96, 96, dtype=torch.float64)
    image = model.model.get_image_features(pixels).pooler_output

    def cross(x, index):
        block = decoder.cross_attention_layers[index]
        attention = block.cross_attn

        def heads(projected):
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        keys, values = (heads(p(image)).repeat_interleave(2, 1) for p in (attention.k_proj, attention.v_proj))
        scores = heads(attention.q_proj(block.input_layernorm(x))) @ keys.mT * attention.scaling
        x = x + attention.o_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return x + block.mlp(block.post_attention_layernorm(x))

    x = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(x, torch.arange(4)[None])
    causal = torch.full((4, 4), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    blocks = {1: 0, 3: 1}  # positions 1 and 4 of the stack: behind one and behind three layers
    for index, layer in enumerate(decoder.layers):
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=causal)[0]
        if position == "after_self_attention" and index + 1 in blocks:
            x = cross(x, blocks[index + 1])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if position == "after_layer" and index + 1 in blocks:
            x = cross(x, blocks[index + 1])
    expected = model.lm_head(decoder.norm(x))
    output = model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert len(output.hidden_states) == 5


def test_a_block_before_the_first_layer_has_no_layer_to_stand_in():
    with pytest.raises(ValueError, match="start at 1"):
        AgeVlmConfig.tiny(300, 299, cross_attention_layers=[0, 4], cross_attention_position="after_self_attention")


@pytest.mark.parametrize("layers", [[2, 2], [5, 1], [-1, 2], [1, 6]])
def test_impossible_cross_layers_are_refused(layers):
    with pytest.raises(ValueError, match="cross_attention_layers"):
        AgeVlmConfig.tiny(300, 299, cross_attention_layers=layers)


def test_cross_blocks_side_by_side_all_run(batch, position):
    model = tiny_model(cross_attention_layers=[1, 2, 6], cross_attention_position=position)
    assert model.config.cross_attention_schedule == [1, 1, 4]
    output = model(**batch, guidance_query_mask=torch.ones_like(batch["input_ids"]), labels=batch["input_ids"])
    assert len(output.cross_attention_maps) == 3
    output.loss.backward()
    for block in model.model.language_model.cross_attention_layers:
        assert all(parameter.grad.any() for parameter in block.parameters())
    assert torch.equal(generate(model, batch), generate(model, batch, use_cache=False))


def test_config_survives_saving(tmp_path):
    config = AgeVlmConfig.tiny(300, 299, cross_attention_layers=[0, 3, 6])
    config.save_pretrained(tmp_path)
    again = AgeVlmConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.cross_attention_schedule == [0, 2, 4]
    assert json.loads((tmp_path / "config.json").read_text())["transformers_version"] == "5.10"
    assert set(again.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}


def test_assemble_copies_the_parts(model, batch):
    from transformers import ConvNextModel

    llama, tower = stock_llama(model), ConvNextModel(model.config.vision_config)
    built = assemble(llama, tower, model.config.image_token_id, cross_attention_layers=[1, 4]).eval()
    assert torch.equal(logits(built, **batch), logits(llama, input_ids=batch["input_ids"]))
    grid = tower(batch["pixel_values"][0]).last_hidden_state.flatten(2).transpose(1, 2)
    assert torch.equal(built.model.vision_tower(batch["pixel_values"][0]).last_hidden_state, grid)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        assemble(llama, tower, image_token_id=10_000)
