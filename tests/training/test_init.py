"""`agevlm init`: parts from folders and from a Hub, what is said when there are none, and what stage 1 makes of it."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, connect
from published_towers import random_weights, timm_shapes
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from training_worker import make_rows, quick
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from workers import fork, killed_here

from agevlm import TINY_PARTS
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.reproduction.matrix import SIZES, Start
from agevlm.reproduction.prepare import save_start
from agevlm.training.cli import init as main
from agevlm.training.cli import parse_init
from agevlm.training.init import count_parameters, plan_parts, without_weights
from agevlm.training.lineage import INIT_FILE
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align
from builders import picture, tiny_tokenizer


DEPTHS, WIDTHS = [1, 1, 1, 1], [8, 16, 16, 32]


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A tiny Llama that knows nothing of pictures, with its tokenizer."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(timm_shapes(DEPTHS, WIDTHS)), file)
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    return save_tower(tmp_path_factory.mktemp("tower") / "tower.safetensors")


def flags(llama: Path | str, tower: Path | str, *more: str) -> list[str]:
    return ["--language-model", str(llama), "--vision-tower", str(tower), "--image-size", "96", *more]


@pytest.fixture(scope="module")
def start(tmp_path_factory, llama, tower) -> Path:
    folder = tmp_path_factory.mktemp("init") / "start"
    main([str(folder), *flags(llama, tower)])
    return folder


# ---- What comes out ----


def test_the_folder_is_a_checkpoint_that_runs_and_holds_the_parts_unchanged(start, llama, tower):
    model = AutoModel.from_pretrained(start, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(start, trust_remote_code=True)
    text = processor.apply_chat_template([{"role": "user", "content": "<|image|>Is there a red apple?"}])
    inputs = processor(images=picture(), text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (96, 96)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]

    language_model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():  # the cross blocks are closed: with or without a picture, it is the Llama
        expected = language_model(inputs["input_ids"]).logits
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model(input_ids=inputs["input_ids"]).logits, expected)
    published = load_file(tower)
    state = model.state_dict()
    for ours, theirs in {
        "embeddings.patch_embeddings.weight": "stem.0.weight",
        "encoder.stages.2.downsampling_layer.1.weight": "stages.2.downsample.1.weight",
        "encoder.stages.3.layers.0.pwconv2.weight": "stages.3.blocks.0.mlp.fc2.weight",
        "encoder.stages.3.layers.0.layer_scale_parameter": "stages.3.blocks.0.gamma",
    }.items():
        assert torch.equal(state[f"model.vision_tower.{ours}"], published[theirs])


def test_the_vocabulary_keeps_its_size_and_answers_end(start, llama):
    config = AgeVlmConfig.from_pretrained(start)
    tokenizer = AutoProcessor.from_pretrained(start).tokenizer
    assert config.text_config.vocab_size == len(tiny_tokenizer()) == len(tokenizer)
    assert config.image_token_id == tiny_tokenizer().convert_tokens_to_ids("<|reserved_special_token_1|>")
    generation = json.loads((start / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert generation["suppress_tokens"] == [config.image_token_id]


def test_the_record_says_what_it_was_made_of(start, llama, tower):
    record = json.loads((start / INIT_FILE).read_text())
    assert record["language_model"]["source"] == llama.name
    assert record["vision_tower"]["source"] == tower.name
    assert record["vision_tower"]["layout"] == "timm"
    assert record["vision_tower"]["left_out"] == {"pooled norm and head": 6}
    assert (record["image_size"], record["visual_tokens"], record["cross_attention_layers"]) == (96, 9, [2])
    assert {"torch", "transformers"} <= record["versions"].keys()
    model = AgeVlmForConditionalGeneration.from_pretrained(start)
    assert record["parameters"] == count_parameters(model)
    assert record["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert record["parameters"]["language_model"] == LlamaForCausalLM.from_pretrained(llama).num_parameters()


def test_stage_1_starts_from_it(start, tmp_path):
    recipe = quick(stage1_align.recipe(size="tiny"), 4, max_steps=2)
    result = run_stage(recipe, tmp_path / "run", data=make_rows("iiii"), init_from=start)
    assert result.status == "trained"
    assert result.lineage["parent"]["init_from"] == start.name
    before = AgeVlmForConditionalGeneration.from_pretrained(start).state_dict()
    after = AgeVlmForConditionalGeneration.from_pretrained(tmp_path / "run").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".cross_attention_layers." in name or ".multi_modal_projector." in name for name in moved)


def test_the_seed_decides_and_the_dtype_halves_the_file(start, llama, tower, tmp_path):
    main([str(tmp_path / "same"), *flags(llama, tower)])
    main([str(tmp_path / "other"), *flags(llama, tower, "--seed", "1", "--dtype", "bfloat16")])
    files = [folder / "model.safetensors" for folder in (start, tmp_path / "same", tmp_path / "other")]
    assert files[0].read_bytes() == files[1].read_bytes()
    first, other = load_file(files[0]), load_file(files[2])
    assert {tensor.dtype for tensor in other.values()} == {torch.bfloat16}
    different = {name for name in first if not torch.equal(first[name].bfloat16(), other[name])}
    assert different and all(".cross_attention_layers." in n or ".multi_modal_projector." in n for n in different)
    assert AutoModel.from_pretrained(tmp_path / "other", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("position", ["after_layer", "after_self_attention"])
def test_parts_are_what_the_quickstart_starts_from(tmp_path, position):
    start = Start(position=position)
    save_start(TINY_PARTS, tmp_path / "quickstart", seed=3, size=SIZES["tiny"], start=start)
    places = ["--cross-attention-layers", "1", "4", "--cross-attention-position", position]
    main([str(tmp_path / "init"), "--parts", str(TINY_PARTS), "--seed", "3", *places])
    assert AutoConfig.from_pretrained(tmp_path / "init").cross_attention_position == position
    for name in ("model.safetensors", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "init" / name).read_bytes() == (tmp_path / "quickstart" / name).read_bytes(), name


def test_a_tokenizer_without_reserved_tokens_gets_new_rows(tower, tmp_path):
    vocabulary = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|im_start|>": 256, "<|im_end|>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    llama = save_llama(tmp_path / "llama", tokenizer)
    main(["--output", str(tmp_path / "start"), *flags(llama, tower)])
    record = json.loads((tmp_path / "start" / INIT_FILE).read_text())
    assert record["chat_style"] == "ChatML"
    assert (record["language_model"]["vocabulary"], record["language_model"]["added_to_vocabulary"]) == (259, 1)
    weights = load_file(tmp_path / "start" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    old = load_file(llama / "model.safetensors")["model.embed_tokens.weight"].float()
    assert weights.shape[0] == 259 and torch.equal(weights[:258], old)


def test_pixels_are_normalized_as_the_tower_was_trained(llama, tmp_path):
    save_tower(tmp_path / "tower" / "model.safetensors")
    stated = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "tower" / "config.json").write_text(json.dumps(stated))
    main([str(tmp_path / "start"), *flags(llama, tmp_path / "tower")])
    image_processor = AutoProcessor.from_pretrained(tmp_path / "start").image_processor
    assert (list(image_processor.image_mean), list(image_processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


# ---- The paper's size ----


def save_large_parts(folder: Path) -> tuple[Path, Path]:
    """Llama-3.2-1B's configuration with no weights, and the names and shapes of ConvNeXt-L in a file full of holes."""
    text = AgeVlmConfig.paper().text_config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    llama, tower = folder / "llama", folder / "tower.safetensors"
    tiny_tokenizer().save_pretrained(llama)
    (llama / "config.json").write_text(json.dumps(text))
    (llama / "model.safetensors").touch()
    header, end = {}, 0
    for name, shape in timm_shapes([3, 3, 27, 3], [192, 384, 768, 1536]).items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with tower.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return llama, tower


def test_the_real_parts_make_the_papers_model(tmp_path, capsys):
    llama, tower = save_large_parts(tmp_path)
    argv = [str(tmp_path / "start"), "--language-model", str(llama), "--vision-tower", str(tower)]
    model = without_weights(plan_parts(parse_init(argv)), seed=0)
    with torch.device("meta"):
        paper = AgeVlmForConditionalGeneration(AgeVlmConfig.paper())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in paper.state_dict().items()
    }
    assert model.config.cross_attention_layers == [2, 7, 12, 17]
    text = model.config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        2048,
        16,
        32,
        8,
    )
    assert (text.intermediate_size, text.vocab_size, text.head_dim, text.rms_norm_eps) == (8192, 128256, 64, 1e-5)
    assert text.rope_parameters == paper.config.text_config.rope_parameters
    counts = count_parameters(model)
    assert counts["language_model"] == 1_235_814_400  # Llama-3.2-1B, tied embeddings counted once
    assert counts["vision"] == 196_227_264  # ConvNeXt-L without the pooled norm
    assert counts["projector"] == (1536 + 1) * 2048 + (2048 + 1) * 2048

    main([*argv, "--dry-run"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for number in ("1,235,814,400", "196,227,264", f"{counts['total']:,}", "visual tokens 576", "2, 7, 12, 17"):
        assert number in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "tower.safetensors"]


# ---- What is refused ----


def refuse(output: Path, argv: list[str], message: str) -> None:
    """The command fails with `message` and leaves nothing."""
    with pytest.raises(ValueError, match=message):
        main([str(output), *argv])
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


def test_a_folder_in_use_is_left_alone(llama, tower, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        main([str(tmp_path), *flags(llama, tower)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_towers_that_do_not_fit_are_refused(llama, tmp_path):
    out = tmp_path / "start"
    save_file({"layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    refuse(out, flags(llama, tmp_path / "resnet.safetensors"), r"no known layout.*layer1\.0\.conv1\.weight")
    five = {name: torch.zeros(shape) for name, shape in timm_shapes([1] * 5, [8] * 5).items()}
    save_file(five, tmp_path / "five.safetensors")
    refuse(out, flags(llama, tmp_path / "five.safetensors"), "one cell of 64 pixels")
    incomplete = {
        name: torch.zeros(shape) for name, shape in timm_shapes(DEPTHS, WIDTHS).items() if "gamma" not in name
    }
    save_file(incomplete, tmp_path / "incomplete.safetensors")
    refuse(out, flags(llama, tmp_path / "incomplete.safetensors"), r"missing: .*layer_scale_parameter")


def test_pickles_are_refused_by_name(llama, tower, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "open_clip_pytorch_model.bin").write_bytes(b"not to be opened")
    refuse(tmp_path / "start", flags(llama, tmp_path / "pickled"), r"only as open_clip_pytorch_model\.bin.*save_file")
    refuse(tmp_path / "start", flags(tmp_path / "pickled", tower), "only as open_clip_pytorch_model")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "start", flags(tmp_path / "empty", tower), "holds no weights")


def test_several_weights_are_not_guessed_between(llama, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_tower(tmp_path / "tower" / name)
    refuse(tmp_path / "start", flags(llama, tmp_path / "tower"), r"several weights: a\.safetensors, b\.safetensors")


def test_a_missing_shard_is_named(llama, tower, tmp_path):
    folder = save_llama(tmp_path / "llama")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(tmp_path / "start", flags(folder, tower), "holds no model-00002-of-00002.safetensors")


def test_language_models_that_do_not_fit_are_refused(llama, tower, tmp_path):
    out = tmp_path / "start"
    folder = save_llama(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    metadata = {"format": "pt"}
    without = {name: tensor for name, tensor in weights.items() if "layers.3.mlp" not in name}
    save_file(without, folder / "model.safetensors", metadata)
    refuse(out, flags(folder, tower), r"3 missing \(model\.layers\.3\.mlp")
    save_file(weights | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, folder / "model.safetensors", metadata)
    refuse(out, flags(folder, tower), r"1 unexpected \(model\.layers\.9\.mlp\.up_proj\.weight")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refuse(out, flags(folder, tower), r"model\.safetensors cannot be used")
    (folder / "tokenizer.json").unlink()
    refuse(out, flags(folder, tower), r"no tokenizer\.json")
    GPT2Config().save_pretrained(folder)
    refuse(out, flags(folder, tower), "type 'gpt2'")


def test_sizes_and_layers_that_do_not_fit_are_noticed_before_weights_are_read(tmp_path):
    llama, tower = save_large_parts(tmp_path)
    argv = ["--language-model", str(llama), "--vision-tower", str(tower)]
    refuse(tmp_path / "start", [*argv, "--image-size", "700"], "multiple of 32")
    refuse(tmp_path / "start", [*argv, "--cross-attention-layers", "2", "99"], r"stack of 16 \+ 2 = 18 layers")


def test_parts_stand_alone(tmp_path, capsys):
    refuse(tmp_path / "start", ["--parts", str(tmp_path)], "holds no parts")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "start"), "--parts", str(TINY_PARTS), "--language-model", "x"])
    assert "--parts brings both parts" in capsys.readouterr().err


def test_a_run_killed_while_saving_leaves_no_folder_and_can_be_repeated(llama, tower, tmp_path):
    argv = [str(tmp_path / "start"), *flags(llama, tower)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agevlm.training.init.write_json", killed_here)
        fork(lambda: main(argv), killed=True)
    assert not (tmp_path / "start").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".start.incomplete"]
    main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


# ---- The Hub ----

NO_ACCESS = {"a/gated": (403, "GatedRepo"), "a/gated-no-login": (401, "GatedRepo")}


@pytest.fixture(scope="module")
def hub(tmp_path_factory, llama):
    """A Hub with two good repositories, gated ones and one of pickles."""
    tower = save_tower(tmp_path_factory.mktemp("hub") / "model.safetensors").read_bytes()
    pickle = {"pytorch_model.bin": b"not to be downloaded"}
    with HubServer(tmp_path_factory.mktemp("contents")) as server:
        server.add_repo("a/llama", llama)
        config = json.dumps({"architecture": "convnext_large_mlp"}).encode()
        server.add_repo("a/tower", {"model.safetensors": tower, "config.json": config, **pickle})
        server.add_repo("a/pickled", {"config.json": b"{}", **pickle})
        for name, gated in NO_ACCESS.items():
            server.add_repo(name, llama, gated=gated)
        yield server


def test_parts_come_from_the_hub_and_what_it_refuses_is_told_in_a_sentence(hub, start, tmp_path, monkeypatch):
    """`test_hub_roundtrip.py` has a process that knows the Hub by its environment alone."""
    connect(hub, monkeypatch, token=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "start"
    no_access = (
        "{name} is gated and you have no access: accept its license at {hub}/{name} and log in with `hf auth login`, "
        "or pass a folder that has it."
    )
    for model, tower, sentence in (
        ("a/gated", "a/tower", no_access.format(name="a/gated", hub=hub.address)),
        ("a/gated-no-login", "a/tower", no_access.format(name="a/gated-no-login", hub=hub.address)),
        ("a/missing", "a/tower", "a/missing is neither here nor on the Hub"),
        ("a/llama", "a/pickled", "a/pickled holds its weights only as pytorch_model.bin"),
        ("no/such/folder", "a/tower", "no/such/folder is neither a folder"),
    ):
        refuse(out, flags(model, tower), re.escape(sentence))

    def downloaded() -> set[str]:
        return {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}

    argv = flags("a/llama", "a/tower")
    main(["--output", str(out), *argv, "--dry-run"])
    assert not out.exists() and "config.json" in downloaded() and "model.safetensors" not in downloaded()

    # for good; then again without a network
    main(["--output", str(out), *argv])
    assert "model.safetensors" in downloaded() and "pytorch_model.bin" not in downloaded()
    weights = (out / "model.safetensors").read_bytes()
    assert weights == (start / "model.safetensors").read_bytes()
    record = json.loads((out / INIT_FILE).read_text())
    for part, name in {"language_model": "a/llama", "vision_tower": "a/tower"}.items():
        assert record[part]["revision"] == hub.commits(name)[0].oid
    assert record["vision_tower"]["source"] == "a/tower"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main(["--output", str(tmp_path / "again"), *argv])
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    away = f"b/unknown is not in the local cache and {hub.address}/b/unknown cannot be reached"
    refuse(tmp_path / "other", flags("b/unknown", "a/tower"), re.escape(away))
