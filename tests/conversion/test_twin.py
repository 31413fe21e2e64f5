"""The concatenating twin: the same weights spliced by hand, the same rows, and TRL's own trainer by our recipes."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from tokenizers import processors
from training_worker import IN_FLOAT32, make_arguments, make_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

from agevlm.conversion.twin import ConcatenatingCollator, concatenating_processor, concatenating_twin
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.training import train
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.freezing import set_trainable
from agevlm.training.stages import stage1_align, stage2_adapt_vision, stage4_instruct
from builders import IMAGE_SIZE, picture, row, tiny_model, tiny_processor, tiny_scenes


CELLS = (IMAGE_SIZE // 32) ** 2


@pytest.fixture(scope="module")
def ours():
    return tiny_model(), tiny_processor()


@pytest.fixture(scope="module")
def twin(ours):
    return concatenating_twin(*ours)


def ask(processor, images, questions):
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": f"<|image|>{question}"}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    return processor(
        images=[[image] for image in images], text=texts, padding=True, padding_side="left", return_tensors="pt"
    )


def collapsed(ids: torch.Tensor, image_token: int) -> list[int]:
    """The tokens of a text with one placeholder for each picture."""
    tokens, result = ids.tolist(), []
    for index, token in enumerate(tokens):
        if token != image_token or tokens[max(0, index - CELLS) : index] != [image_token] * CELLS:
            result.append(token)
    return [token for index, token in enumerate(result) if token != image_token or result[index - 1] != token]


@torch.no_grad()
def test_logits_are_our_parts_spliced_by_hand(ours, twin):
    model, processor = ours
    other, other_processor = twin
    image, question = picture(), "Is there a red apple in the image?"
    inputs, text = ask(other_processor, [image], [question]), ask(processor, [image], [question])["input_ids"]
    language = LlamaForCausalLM(LlamaConfig(**model.config.text_config.to_dict())).eval()
    weights = model.model.language_model.state_dict()
    own = {name: value for name, value in weights.items() if not name.startswith("cross_attention_layers.")}
    language.model.load_state_dict(own)
    language.lm_head.load_state_dict(model.lm_head.state_dict())
    grid = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    cells = grid.flatten(2).transpose(1, 2) if grid.dim() == 4 else grid
    tokens = model.model.multi_modal_projector(cells)
    assert tokens.shape[1] == CELLS
    at = text[0].tolist().index(model.config.image_token_id)
    words = language.get_input_embeddings()
    spliced = torch.cat([words(text[:, :at]), tokens, words(text[:, at + 1 :])], dim=1)
    expected = language(inputs_embeds=spliced).logits
    assert torch.allclose(other(**inputs).logits, expected, atol=1e-5)
    blind = other(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0).flip(-1) + 1}).logits
    assert (blind - expected).abs().max() > 1e-3


@torch.no_grad()
def test_without_pictures_both_are_the_llama(ours, twin):
    ids = torch.randint(20, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours[0](input_ids=ids).logits, twin[0](input_ids=ids).logits, atol=1e-5)


def test_the_twin_owns_its_weights_and_lacks_the_cross_blocks_alone(ours, twin):
    model, other = ours[0], twin[0]
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    count = {name: p.numel() for name, p in model.named_parameters()}
    shared = sum(n for name, n in count.items() if "cross_attention_layers" not in name)
    pooled = sum(p.numel() for p in other.model.vision_tower.layernorm.parameters())
    assert other.num_parameters() == shared + pooled


# ---- Of equal size ----


def unused(twin) -> int:
    """Parameters of the pooled vector's norm, which a stock ConvNeXt has and ours leaves out."""
    return sum(parameter.numel() for parameter in twin.model.vision_tower.layernorm.parameters())


@pytest.fixture(scope="module")
def equal(ours):
    return concatenating_twin(*ours, equal_size=True)


def test_of_equal_size_it_has_a_layer_for_every_cross_block(ours, twin, equal):
    model, deeper = ours[0], equal[0]
    added = model.config.cross_attention_layers
    assert deeper.num_parameters() - unused(deeper) == model.num_parameters()
    assert len(deeper.model.language_model.layers) == len(twin[0].model.language_model.layers) + len(added)
    # each layer for its block: the same parameters, name by name
    for index, block in zip(added, model.model.language_model.cross_attention_layers, strict=True):
        layer = dict(deeper.model.language_model.layers[index].named_parameters())
        for name, value in block.named_parameters():
            own = layer.pop(name.replace("cross_attn", "self_attn"))
            assert own.shape == value.shape
            assert torch.equal(own, value) != ("o_proj" in name or "down_proj" in name), name
        assert not layer


@torch.no_grad()
def test_before_training_it_computes_what_the_smaller_one_computes(twin, equal):
    inputs = ask(twin[1], [picture(), picture(50, 90, seed=1)], ["Is there a red apple?", "a"])
    assert torch.allclose(equal[0](**inputs).logits, twin[0](**inputs).logits, atol=1e-6)


PAPER = (AgeVlmConfig.paper, 768, [2, 7, 12, 17], 1_682_671_808, 1_439_385_792)
TINY = (partial(AgeVlmConfig.tiny, vocab_size=768, image_token_id=7), 224, [1, 4], 1_990_648, 1_596_920)


@pytest.mark.parametrize(("config", "side", "blocks", "equal", "plain"), [PAPER, TINY], ids=["paper", "tiny"])
def test_the_figures(config, side, blocks, equal, plain):
    """On the meta device: ours and the larger twin, and the smaller twin, without what nothing reads."""
    with torch.device("meta"):
        model, processor = AgeVlmForConditionalGeneration(config()), tiny_processor(image_size=side)
        twins = [concatenating_twin(model, processor, equal_size=size)[0] for size in (True, False)]
    assert list(model.config.cross_attention_layers) == list(twins[0].config.text_config.added_layers) == blocks
    assert model.num_parameters() == equal
    assert [twin.num_parameters() - unused(twin) for twin in twins] == [equal, plain]


def test_saved_and_loaded_it_keeps_its_layers_apart(equal, tmp_path):
    """Table 1 for it: stages 1 to 3 train the added layers as they would train cross blocks."""
    equal[0].save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert len(loaded.model.language_model.layers) == 6
    added = {name for name, _ in loaded.named_parameters() if re.search(r"language_model\.layers\.(1|4)\.", name)}
    assert list(loaded.config.text_config.added_layers) == [1, 4] and len(added) == 2 * 9
    language = {name for name, _ in loaded.named_parameters() if "language_model" in name or "lm_head" in name} - added
    for parts, frozen, expected in (
        (["cross_attention"], [], added),
        (["language_model"], [], language),
        (["language_model"], ["self_attention"], {n for n in language if "attn" not in n and "input_layer" not in n}),
    ):
        set_trainable(loaded, parts, frozen)
        assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("field", [{"cross_attention_gate": "tanh"}, {"cross_attention_qk_norm": True}])
def test_cross_blocks_that_hold_more_than_a_llama_layer_are_refused(ours, field):
    with pytest.raises(ValueError, match="Leave `equal_size` out"):
        concatenating_twin(tiny_model(**field), ours[1], equal_size=True)


def test_pixels_are_ours(ours, twin):
    def of(image):
        mine = ask(ours[1], [image], ["a"])["pixel_values"].flatten(0, 1)
        return mine, ask(twin[1], [image], ["a"])["pixel_values"]

    assert torch.allclose(*of(picture()), atol=1e-5)
    # Ours resizes before the bars are put on, to whole pixels, Llava's after: where they meet, the filter mixes them.
    mine, other = of(picture(5, 7).resize((50, 70)))
    apart = (mine - other).abs()[0]
    assert apart.mean() < 0.05 and apart[:, 5:-5, 22:-22].max() < 0.3


def test_batches_hold_the_same_texts_and_answers(ours, twin):
    """Text alone, one picture, two pictures: the collators differ in nothing but the pictures' tokens."""
    rows = [*make_rows("tgi"), row("two", images=2, seed=7)]
    mine, other = AgeVlmDataCollator(ours[1])(rows), ConcatenatingCollator(twin[1])(rows)
    token = ours[0].config.image_token_id
    assert other["pixel_values"].shape == (4, 3, IMAGE_SIZE, IMAGE_SIZE)
    for index, source in enumerate(rows):
        text, long = (batch["input_ids"][index][batch["attention_mask"][index].bool()] for batch in (mine, other))
        assert long.numel() - text.numel() == (CELLS - 1) * len(source["images"])
        if len(source["images"]) < 2:
            assert collapsed(long, token) == text.tolist()
        answers = [batch["labels"][index][batch["labels"][index] != -100].tolist() for batch in (mine, other)]
        assert answers[0] == answers[1] != []


def test_max_length_counts_a_picture_as_one_token(ours, twin):
    rows = list(make_rows("gi"))
    for length in (20, 1000):
        mine = AgeVlmDataCollator(ours[1], max_length=length)(rows)["input_ids"].shape[1]
        assert ConcatenatingCollator(twin[1], max_length=length)(rows)["input_ids"].shape[1] == mine + CELLS - 1


def test_a_text_that_spells_a_control_token_is_named(twin):
    bad = row("bad")
    bad = {**bad, "messages": [bad["messages"][0], {"role": "assistant", "content": "No<|eot_id|>"}]}
    with pytest.raises(ValueError, match=r"id 'bad'.*messages\[1\].content holds '<\|eot_id\|>', a control token"):
        ConcatenatingCollator(twin[1])([bad])


def test_a_bad_row_is_named(twin):
    bad = {**row("bad"), "images": []}
    with pytest.raises(ValueError, match="bad"):
        ConcatenatingCollator(twin[1])([bad])


def test_the_first_token_comes_once(ours):
    """Llama-3's tokenizer adds it to every text, and the chat template has written it."""
    processor = copy.deepcopy(ours[1])
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    made = ask(concatenating_processor(processor), [picture()], ["a"])["input_ids"][0].tolist()
    assert made.count(tokenizer.bos_token_id) == 1 and made[0] == tokenizer.bos_token_id


def test_other_geometries_are_refused(ours):
    with pytest.raises(ValueError, match=r"geometry.*stretch"):
        concatenating_twin(ours[0], tiny_processor(geometry="stretch"))


def test_saved_it_is_a_checkpoint_of_transformers(twin, tmp_path):
    other, processor = twin
    other.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = AutoProcessor.from_pretrained(tmp_path)
    inputs = ask(again, [picture(), picture(50, 90, seed=1)], ["Is there a red apple?", "a"])
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, other(**inputs).logits, atol=1e-6)
    made = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    alone = ask(again, [picture(50, 90, seed=1)], ["a"])
    single = loaded.generate(**alone, max_new_tokens=5, do_sample=False, use_cache=False)
    single = single[0, alone["input_ids"].shape[1] :].tolist()
    assert made[1].tolist()[: len(single)] == single


@pytest.mark.parametrize(
    ("stage", "moves"),
    [
        (stage1_align, ("multi_modal_projector",)),
        (stage2_adapt_vision, ("multi_modal_projector", "vision_tower.encoder.stages.3")),
        (stage4_instruct, ("multi_modal_projector", "vision_tower", "language_model", "lm_head")),
    ],
    ids=["1", "2", "4"],
)
def test_trls_own_trainer_trains_it_by_our_recipes(ours, stage, moves, tmp_path):
    other, processor = concatenating_twin(*ours)
    recipe = stage.recipe(variant="ca-baseline").override(**IN_FLOAT32)
    set_trainable(other, recipe.trains, recipe.frozen)
    quiet = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
             "save_strategy": "no", "disable_tqdm": True, "max_steps": 6, "logging_steps": 1, "warmup_steps": 0,
             "learning_rate": 3e-3}  # fmt: skip
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    trainer = SFTTrainer(
        other,
        AgeVlmSFTConfig(**recipe.training_arguments(**quiet)),
        ConcatenatingCollator(processor),
        train_dataset=make_rows("gigi"),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name for name, p in other.named_parameters() if not torch.equal(p, before[name])}
    expected = {
        name for name in before if any(part in name for part in moves) and "vision_tower.layernorm" not in name
    }
    assert moved == expected


def test_one_command_trains_it(ours, equal, tmp_path, capsys):
    """A stage from an AGE-VLM's folder; the same call again finds it done; the next stage starts from it."""
    for part in ours:
        part.save_pretrained(tmp_path / "start")
    scenes = tiny_scenes(tmp_path / "scenes")
    rest = ["--data", str(scenes), "--size", "tiny", "--max_steps", "2", "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "1", "--warmup_steps", "0", "--disable_tqdm", "true"]  # fmt: skip
    places = ["--init_from", str(tmp_path / "start"), "--output_dir", str(tmp_path / "align")]
    align = ["stage1_align", "--variant", "twin", *places, *rest]
    train.main(align)
    assert (
        f"{ours[0].num_parameters():,} parameters; its twin: {equal[0].num_parameters():,}" in capsys.readouterr().out
    )
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "align").state_dict()
    moved = {name for name, value in equal[0].state_dict().items() if not torch.equal(value, trained[name])}
    added = [f"language_model.layers.{index}." for index in (1, 4)]
    assert all("multi_modal_projector" in name or any(layer in name for layer in added) for name in moved)
    assert {f"model.{layer}self_attn.o_proj.weight" for layer in added} <= moved
    assert "model.multi_modal_projector.linear_1.weight" in moved
    written = (tmp_path / "align" / "model.safetensors").stat().st_mtime_ns
    train.main(align)
    assert (tmp_path / "align" / "model.safetensors").stat().st_mtime_ns == written
    instruct = ["--init_from", str(tmp_path / "align"), "--output_dir", str(tmp_path / "instruct"), *rest]
    with pytest.raises(ValueError, match=r"`--variant twin-plain` says how an AGE-VLM .*align is a 'fast_vlm'"):
        train.main(["stage4_instruct", "--variant", "twin-plain", *instruct])
    train.main(["stage4_instruct", "--variant", "twin", *instruct])
    state = json.loads((tmp_path / "instruct" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and not list((tmp_path / "instruct").glob("*.bin"))
    assert not list(tmp_path.glob(".twin-*"))


@pytest.mark.parametrize(
    "flags",
    [("--push_to_hub", "true"), ("--push-to-hub", "true"), ("--use-peft",), ("--dry-run",), ("--probe_steps", "3"),
     ("--mask_fraction", "0.5"), ("--mask-fraction", "0.5"), ("--mask-fraction=0.5",), ("--guidance-weight", "1")],
)  # fmt: skip
def test_the_command_refuses_what_the_twin_does_not_have(tmp_path, monkeypatch, flags):
    """Checked on parsed values: every spelling is seen."""
    monkeypatch.chdir(tmp_path)
    name = flags[0].removeprefix("--").split("=")[0].replace("-", "_")
    with pytest.raises(ValueError, match=f"has no `{name}`"):
        train.main(["stage4_instruct", "--variant", "twin", "--size", "tiny", *flags])
    assert not list(tmp_path.iterdir())


def test_flags_with_dashes_reach_the_twin():
    recipe, _, training, _ = train.parse(["stage1_align", "--variant", "twin", "--output-dir", "here"])
    assert (recipe.variant, training.output_dir) == ("twin", "here")
    assert train.parse(["stage4_instruct", "--variant", "twin", "--size", "tiny"])[0].mask_fraction == 0


def test_text_alone_trains_in_a_batch_of_its_own(ours, tmp_path):
    other, processor = concatenating_twin(*ours)
    trainer = SFTTrainer(
        other,
        make_arguments(tmp_path, max_steps=2),
        ConcatenatingCollator(processor),
        train_dataset=make_rows("ttgt"),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.state.global_step == 2
