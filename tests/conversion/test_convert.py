"""`agevlm convert`: what it writes and from where, what it refuses, and that nothing half-written is left."""

import json
import os
import pickle
from pathlib import Path

import published_baselines as published
import pytest
import torch
from hub_server import HubServer, connect
from safetensors.torch import load_file, save_file
from tiny_baselines import LAYERS, QUESTION, Published, conversation, encode
from transformers import AutoModelForImageTextToText, AutoProcessor

from agevlm.conversion import cli, convert, convllava, mobilevlm
from agevlm.conversion.sources import Source
from builders import picture


def test_convllava_takes_the_tower_that_the_authors_loader_takes(tmp_path, words, vocabulary, capsys):
    original = Published(tmp_path, "convllava", words, vocabulary)
    image, command = picture(90, 60), ["convllava", str(original.folder)]
    cli.main([*command, str(tmp_path / "default")])
    cli.main([*command, str(tmp_path / "inside"), "--vision-from-checkpoint"])
    record = json.loads((tmp_path / "default" / "agevlm_conversion.json").read_text())
    inside = {
        name.removeprefix("model.vision_tower.vision_tower."): value
        for name, value in original.weights.items()
        if "vision_tower" in name
    }
    difference = max((original.tower[name] - inside[name]).abs().max().item() for name in original.tower)
    assert record["vision_tower"]["largest_difference_from_checkpoint"] == pytest.approx(difference)
    assert f"{difference:.3g}" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "default")
    inputs = encode(processor, [conversation(image, [QUESTION])])
    for folder, tower in (("default", original.tower), ("inside", inside)):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            logits = model(**inputs).logits[..., :vocabulary]
        assert (logits - original.logits(image, [QUESTION], tower)).abs().max() < 1e-5


def test_pictures_are_as_large_as_the_loader_makes_them(tmp_path):
    """Its own size if that is above 256, else the tower's; mean and deviation are the tower's."""
    tower = Source("tower", tmp_path, None, ())
    with pytest.raises(ValueError, match="how large the pictures are"):
        convllava.picture_settings(tower, {"mm_vision_resolution": 256})
    stated = {"crop_size": {"height": 512, "width": 512}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    assert convllava.picture_settings(tower, {"mm_vision_resolution": 256})["image_size"] == 512
    assert convllava.picture_settings(tower, {"mm_vision_resolution": 768})["image_size"] == 768
    assert convllava.picture_settings(tower, {})["image_mean"] == [0.1, 0.2, 0.3]


def test_shards_hold_the_same_tensors_one_shard_at_a_time(pair, tmp_path, monkeypatch):
    original, folder = pair
    source = convert.locate(str(original.folder), bins=True)
    target = convllava.prepare(source, bins=True) if original.system == "convllava" else mobilevlm.prepare(source)
    alive, most, save = [0], [0], convert.save_file
    read = type(target).tensor

    def counted(self, name):
        tensor = read(self, name)
        alive[0] += tensor.nbytes
        most[0] = max(most[0], alive[0])
        return tensor

    def saved(shard, *args, **kwargs):
        save(shard, *args, **kwargs)
        alive[0] -= sum(tensor.nbytes for tensor in shard.values())

    monkeypatch.setattr(type(target), "tensor", counted)
    monkeypatch.setattr(convert, "save_file", saved)
    convert.write_weights(target, tmp_path, shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and most[0] <= max(200_000, max((tmp_path / file).stat().st_size for file in files))
    whole = load_file(folder / "model.safetensors")
    parts = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_every_tensor_stays_bit_for_bit(pair):
    original, folder = pair
    converted = load_file(folder / "model.safetensors")
    values = {tensor.numpy().tobytes() for tensor in converted.values()}
    grown = ("model.embed_tokens.weight", "lm_head.weight")
    for name, tensor in original.weights.items():
        if name in grown or "inv_freq" in name or (original.system == "convllava" and "vision_tower" in name):
            continue
        assert tensor.numpy().tobytes() in values, name


def test_half_precision_stays_as_it_is_published(tmp_path, words, vocabulary):
    """The checkpoint in bfloat16, its tower in float32, as ConvLLaVA's: no tensor is cast on the way."""
    original, dtype = Published(tmp_path, "convllava", words, vocabulary), torch.bfloat16
    rewrite(original, lambda weights: {name: tensor.to(dtype) for name, tensor in weights.items()})
    cli.main(["convllava", str(original.folder), str(tmp_path / "out")])
    written = load_file(tmp_path / "out" / "model.safetensors")
    kinds = {name: tensor.dtype for name, tensor in written.items()}
    assert {kinds[name] for name in kinds if "vision_tower" in name} == {torch.float32}
    assert {kinds[name] for name in kinds if "vision_tower" not in name} == {dtype}
    assert torch.equal(written["lm_head.weight"][:vocabulary], original.weights["lm_head.weight"].to(dtype))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_checkpoint_and_tower_come_from_the_hub_at_a_revision(tmp_path, words, vocabulary, monkeypatch):
    """Pickles stay where they are unless asked for."""
    original = Published(tmp_path, "convllava", words, vocabulary, bins=True)
    (original.folder / "config.json").write_text(json.dumps({**original.config, "mm_vision_tower": "a/tower"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    command, out = ["convllava", "a/convllava"], tmp_path / "out"
    with HubServer(tmp_path / "hub") as hub:
        connect(hub, monkeypatch)
        commit = hub.add_repo("a/convllava", original.folder).find("main").oid
        hub.add_repo("a/tower", tmp_path / "tower")
        refuse(command, "Or pass `--read-bin`", out)
        cli.main([*command, "--output", str(out), "--read-bin", "--revision", "main"])
    record = json.loads((out / "agevlm_conversion.json").read_text())
    assert record["revision"] == commit and record["vision_tower"]["source"] == "a/tower"


# ---- Refusals ----


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"


@pytest.fixture
def small(tmp_path, words, vocabulary) -> Published:
    return Published(tmp_path, "mobilevlm-v2", words, vocabulary)


def refuse(command: list, message: str, output: Path) -> None:
    with pytest.raises(ValueError, match=message):
        cli.main([*map(str, command), str(output)])
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))


def rewrite(small: Published, change) -> None:
    for file in small.folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "peg.peg.0.bias" not in k}, r"missing: .*projector\.peg\.bias"),
        (lambda w: w | {"model.extra": torch.ones(1)}, r"unexpected: model\.extra of"),
        (lambda w: {k: v[:, :5].clone() if "mlp.mlp.2.weight" in k else v for k, v in w.items()},
         r"of another shape: model\.mm_projector\.mlp\.mlp\.2\.weight of .* \[32, 5\] instead of \[32, 32\]"),
        (lambda w: {k: v for k, v in w.items() if "patch_embedding" not in k}, "lacks .*patch_embedding"),
    ],
    ids=["missing", "unexpected", "shape", "no tower"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(small, tmp_path, change, message):
    rewrite(small, change)
    refuse(["mobilevlm-v2", small.folder], message, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_projector_type", "ldpnet"), ("mm_use_im_start_end", True), ("image_aspect_ratio", "anyres"),
        ("mm_vision_select_layer", -1), ("mm_vision_tower", "openai/clip-vit-base-patch16"),
    ],
)  # fmt: skip
def test_other_configurations_are_refused_by_field(small, tmp_path, field, value):
    (small.folder / "config.json").write_text(json.dumps({**small.config, field: value}))
    refuse(["mobilevlm-v2", small.folder], f"`{field}` of config.json is {value!r}", tmp_path / "out")


@pytest.mark.parametrize("table", ["embed_tokens.weight", "lm_head.weight"])
def test_a_vocabulary_of_another_size_is_refused_not_grown(small, tmp_path, table):
    rewrite(small, lambda w: {k: v[:-3].clone() if k.endswith(table) else v for k, v in w.items()})
    words = small.config["vocab_size"]
    refuse(
        ["mobilevlm-v2", small.folder],
        rf"{table} of .* \[{words - 3}, 32\] instead of \[{words}, 32\]",
        tmp_path / "out",
    )


def test_quantized_weights_are_refused(small, tmp_path):
    rewrite(small, lambda w: w | {"model.layers.0.mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)})
    refuse(["mobilevlm-v2", small.folder], r"up_proj\.qweight \(I32\).*before it was quantized", tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SHARD).unlink(), f"holds no {SHARD}, which its index names"),
        (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:5000]), f"{SHARD} is no whole safetensors file"),
        (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is no valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds no table"),
        (lambda f: (f / "config.json").unlink(), r"holds no config\.json"),
        (lambda f: (f / "tokenizer.model").unlink(), r"holds neither tokenizer\.model nor"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x"), r"tokenizer\.model cannot be read as a tokenizer"),
    ],
    ids=["no shard", "half a shard", "index", "config", "no config", "no tokenizer", "tokenizer"],
)
def test_damaged_folders_are_refused_by_file(small, tmp_path, damage, message):
    damage(small.folder)
    refuse(["mobilevlm-v2", small.folder], message, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "32"), ("num_attention_heads", 5), ("vocab_size", "many")]
)
def test_sizes_that_make_up_no_llama_are_refused(small, tmp_path, field, value):
    (small.folder / "config.json").write_text(json.dumps({**small.config, "num_key_value_heads": None, field: value}))
    refuse(["mobilevlm-v2", small.folder], r"config\.json describes no Llama", tmp_path / "out")


def test_pictures_that_the_stride_does_not_divide_are_refused(tmp_path, words, vocabulary):
    original = Published(tmp_path, "convllava", words, vocabulary)
    (original.folder / "config.json").write_text(json.dumps({**original.config, "mm_vision_resolution": 300}))
    refuse(["convllava", original.folder], "300 pixels are no multiple of the tower's stride of 64", tmp_path / "out")


def test_an_index_leads_neither_out_of_its_folder_nor_to_pickles(small, tmp_path):
    """Pickles under the name of safetensors' index, shards beside the folder; nobody has passed `--read-bin`."""
    index, command = small.folder / INDEX, ["mobilevlm-v2", small.folder]
    text = index.read_text()
    for shard in small.folder.glob("*.safetensors"):
        torch.save(load_file(shard), shard.with_suffix(".bin"))
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    for elsewhere in (SHARD.replace(".safetensors", ".bin"), f"../{SHARD}", str(tmp_path / SHARD)):
        index.write_text(text.replace(SHARD, elsewhere))
        refuse(command, f"names '{elsewhere}': shards are .safetensors files in the same folder", tmp_path / "out")


def test_the_other_system_is_refused(small, tmp_path):
    refuse(["convllava", small.folder], "mm_projector_type", tmp_path / "out")


def test_pickles_are_read_only_when_asked_for_and_only_for_tensors(tmp_path, words, vocabulary):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    original = Published(tmp_path, "mobilevlm-v2", words, vocabulary, bins=True)
    command = ["mobilevlm-v2", original.folder]
    refuse(command, r"only as pytorch_model.*Or pass `--read-bin`", tmp_path / "out")
    index = original.folder / "pytorch_model.bin.index.json"
    index.rename(tmp_path / "index")
    refuse([*command, "--read-bin"], r"neither pytorch_model\.bin nor pytorch_model\.bin\.index", tmp_path / "out")
    (tmp_path / "index").rename(index)
    file = original.folder / "pytorch_model-00001-of-00002.bin"
    good = file.read_bytes()
    torch.save({"model.norm.weight": Evil()}, file)
    refuse([*command, "--read-bin"], "asks for more than tensors", tmp_path / "out")
    file.write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    refuse([*command, "--read-bin"], "bin (asks for more|cannot be read)", tmp_path / "out")
    file.write_bytes(good[: len(good) // 2])
    refuse([*command, "--read-bin"], "cannot be read", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    file.write_bytes(good)
    cli.main([*map(str, command), str(tmp_path / "out"), "--read-bin"])
    record = json.loads((tmp_path / "out" / "agevlm_conversion.json").read_text())
    assert record["read_with"] == "torch.load(weights_only=True)" and record["left_out"] == LAYERS


def test_a_tower_that_cannot_be_had_says_what_to_do(tmp_path, words, vocabulary, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original = Published(tmp_path, "convllava", words, vocabulary)
    (original.folder / "config.json").write_text(json.dumps({**original.config, "mm_vision_tower": "/gone/tower"}))
    refuse(["convllava", original.folder], "--vision-tower.*--vision-from-checkpoint", tmp_path / "out")


def test_a_pickled_tower_says_what_to_pass(tmp_path, words, vocabulary):
    original = Published(tmp_path, "convllava", words, vocabulary)
    tower = published.save_folder(tmp_path / "pickled", original.tower, {"hidden_act": "gelu"}, bins=True)
    command = ["convllava", original.folder, "--vision-tower", tower]
    refuse(command, "vision tower .* `--read-bin` .*`--vision-from-checkpoint`", tmp_path / "out")
    cli.main([*map(str, command), str(tmp_path / "out"), "--read-bin"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_empty_folder_is_taken_and_a_finished_one_left_alone(small, tmp_path):
    (tmp_path / "out").mkdir()
    command = ["mobilevlm-v2", str(small.folder), str(tmp_path / "out")]
    cli.main(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        cli.main(command)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_folder_in_use_and_a_killed_run(small, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        cli.main(["mobilevlm-v2", str(small.folder), str(tmp_path / "used")])
    assert (tmp_path / "used" / "file").read_text() == "mine"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["mobilevlm-v2", str(small.folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.incomplete").exists()
