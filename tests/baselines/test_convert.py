"""`agevlm convert`: published layouts at full size (names, shapes) and tiny (logits, tokens, pixels), refusals.

The other side of every comparison is `published_baselines.py`, which knows nothing of `agevlm.baselines`.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import published_baselines as published
import pytest
import torch
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaTokenizer

from agevlm.baselines import convert, convllava, mobilevlm
from agevlm.baselines.layout import check_names
from agevlm.baselines.prompt import build_processor, load_tokenizer
from agevlm.modeling_agevlm.sources import Source
from builders import picture


DEPTHS, WIDTHS, CONVLLAVA_SIZE = [1, 1, 1, 1, 2], [8, 16, 16, 32, 48], 320  # 5 x 5 tokens of 64 pixels
HIDDEN, MLP, LAYERS, HEADS = 32, 48, 2, 4
CLIP = {"width": 128, "mlp": 64, "layers": 2, "patch": 2, "positions": 24 * 24 + 1}
QUESTION = "Is there a red apple in the image?"
LLAVA = {"model_type": "llava", "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "rms_norm_eps": 1e-5}


@pytest.fixture(scope="module")
def words() -> bytes:
    return published.sentencepiece_model()


@pytest.fixture(scope="module")
def vocabulary(words) -> int:
    return published.sentencepiece.SentencePieceProcessor(model_proto=words).vocab_size()


def language_config(vocabulary: int) -> dict:
    return {
        **LLAVA, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": vocabulary,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


class Published:
    """A tiny published checkpoint: its folder, its weights, and what its authors' code makes of a question."""

    def __init__(self, folder: Path, system: str, words: bytes, vocabulary: int, bins: bool = False):
        self.system, self.words, self.folder = system, words, folder / "published"
        self.config = language_config(vocabulary)
        llama = published.llama_shapes(HIDDEN, MLP, LAYERS, vocabulary, rotary=system == "mobilevlm-v2")
        if system == "convllava":
            self.size = CONVLLAVA_SIZE
            tower = published.convnext_shapes(DEPTHS, WIDTHS)
            shapes = published.convllava_shapes(llama, tower, WIDTHS[-1], HIDDEN)
            # the tower that the loader takes: another one, without the pooled vector's norm
            bare = published.convnext_shapes(DEPTHS, WIDTHS, pooled=False)
            self.tower = published.random_weights(bare, seed=5)
            stated = {"model_type": "convnext", "depths": DEPTHS, "hidden_sizes": WIDTHS, "hidden_act": "gelu"}
            published.save_folder(folder / "tower", self.tower, stated, bins=bins)
            self.config |= {
                "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1, "mm_vision_resolution": self.size,
                "mm_vision_tower": str(folder / "tower"),
            }  # fmt: skip
        else:
            self.size = 48
            shapes = published.mobilevlm_shapes(llama, published.clip_shapes(**CLIP), CLIP["width"], HIDDEN)
            self.config |= {
                "mm_projector_type": "ldpnetv2", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            }  # fmt: skip
        self.weights = published.random_weights(shapes)
        published.save_folder(self.folder, self.weights, self.config, words, bins)
        self.language = published.llama(self.weights, self.config)

    @torch.no_grad()
    def logits(self, image, turns: list[str], tower: dict | None = None) -> torch.Tensor:
        pixels = published.pixels(image, self.size)
        if self.system == "convllava":
            tokens = published.convllava_picture(self.weights, tower or self.tower, DEPTHS, WIDTHS, pixels)
        else:
            config = CLIPVisionConfig(
                hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48,
                patch_size=2, hidden_act="quick_gelu",
            )  # fmt: skip
            tokens = published.mobilevlm_picture(self.weights, config, pixels)
        return published.splice(self.language, published.token_ids(self.words, published.prompt(turns)), tokens)

    def continuation(self, image, question: str, steps: int) -> list[int]:
        """Greedy, without a cache: every token's answer is a forward pass over the whole text."""
        ids: list[int] = []
        prompt = published.token_ids(self.words, published.prompt([question]))
        pixels = published.pixels(image, self.size)
        with torch.no_grad():
            tokens = published.convllava_picture(self.weights, self.tower, DEPTHS, WIDTHS, pixels)
            while len(ids) < steps and ids[-1:] != [2]:
                ids.append(published.splice(self.language, prompt + ids, tokens)[0, -1].argmax().item())
        return ids


@pytest.fixture(scope="module", params=["convllava", "mobilevlm-v2"])
def pair(request, tmp_path_factory, words, vocabulary):
    """A published checkpoint and the folder that it was converted to; ConvLLaVA's from pickles."""
    folder = tmp_path_factory.mktemp(request.param)
    original = Published(folder, request.param, words, vocabulary, bins=request.param == "convllava")
    flags = ["--read-bin"] if request.param == "convllava" else []
    convert.main([request.param, str(original.folder), str(folder / "converted"), *flags])
    return original, folder / "converted"


@pytest.fixture(scope="module")
def loaded(pair):
    original, folder = pair
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return original, model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def conversation(image, turns: list[str]) -> list[dict]:
    first = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": turns[0]}]}
    roles = ("user", "assistant")
    rest = [{"role": roles[n % 2], "content": [{"type": "text", "text": turn}]} for n, turn in enumerate(turns)]
    return [first, *rest[1:]]


def encode(processor, conversations: list[list[dict]]):
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip


@pytest.mark.parametrize("size", [(300, 200), (90, 260), (64, 64)])
@pytest.mark.parametrize("turns", [[QUESTION], [QUESTION, "Yes.", "How many cars are there?"]])
def test_logits_are_those_of_the_published_code(loaded, size, turns):
    original, model, processor = loaded
    image = picture(*size)
    inputs = encode(processor, [conversation(image, turns)])
    expected = original.logits(image, turns)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[1] == expected.shape[1]
    words = expected.shape[-1]
    assert (logits[..., :words] - expected).abs().max() < 1e-5
    assert expected.std() > 0.1  # the comparison means something


def test_the_picture_decides_the_logits(loaded):
    original = loaded[0]
    first, second = (original.logits(picture(90, 60, seed=seed), [QUESTION])[0, -1] for seed in (0, 1))
    assert (first - second).abs().max() > 1e-3


def test_pixels_are_those_of_the_published_code(loaded):
    original, _, processor = loaded
    for image in (picture(300, 200), picture(31, 64)):
        made = encode(processor, [conversation(image, [QUESTION])])["pixel_values"]
        assert torch.allclose(made, published.pixels(image, original.size), atol=1e-5)


def test_a_padded_batch_is_its_rows(loaded):
    _, model, processor = loaded
    asked = [conversation(picture(80, 50), [QUESTION]), conversation(picture(50, 80), ["blue?"])]
    batch = encode(processor, asked)
    assert batch["attention_mask"][1, 0] == 0  # padded on the left
    alone = [encode(processor, [one]) for one in asked]
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        apart = torch.cat([model(**one).logits[:, -1] for one in alone])
    assert torch.allclose(together, apart, atol=1e-5)
    generated = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1] :]
    for row, one in zip(generated, alone, strict=True):
        expected = model.generate(**one, max_new_tokens=6, use_cache=False)[0, one["input_ids"].shape[1] :]
        assert row[: len(expected)].tolist() == expected.tolist()


def test_generation_is_the_published_codes_without_a_cache(loaded):
    original, model, processor = loaded
    if original.system != "convllava":
        pytest.skip("the loop without a cache is written for ConvLLaVA; MobileVLM shares splice and language model")
    image = picture(80, 50)
    inputs = encode(processor, [conversation(image, [QUESTION])])
    made = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
    assert made == original.continuation(image, QUESTION, 8)


def test_added_tokens_change_no_word_and_are_never_said(loaded):
    original, model, processor = loaded
    words = original.config["vocab_size"]
    rows = model.lm_head.weight
    assert rows.shape[0] % 64 == 0 and model.config.image_token_id == words == processor.image_token_id
    assert torch.equal(rows[:words], original.weights["lm_head.weight"])
    with torch.no_grad():
        model.lm_head.weight[words:] *= 50  # would win every step
        inputs = encode(processor, [conversation(picture(), [QUESTION])])
        said = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        model.lm_head.weight[words:] /= 50
    assert (said < words).all()


def test_strings_with_this_projects_placeholder_are_read_the_same(loaded):
    _, _, processor = loaded
    image = picture()
    text = processor.apply_chat_template(
        [{"role": "user", "content": f"<|image|>{QUESTION}"}], add_generation_prompt=True, tokenize=False
    )
    made = processor(images=[[image]], text=[text], return_tensors="pt")
    assert torch.equal(made["input_ids"], encode(processor, [conversation(image, [QUESTION])])["input_ids"])


def test_a_user_without_the_repository_loads_asks_and_saves(pair, loaded, tmp_path):
    original, folder = pair
    _, model, processor = loaded
    image = picture(70, 40)
    image.save(tmp_path / "picture.png")
    inputs = encode(processor, [conversation(image, [QUESTION])])
    with torch.no_grad():
        logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=8)
    save_file(
        {"input_ids": inputs["input_ids"], "logits": logits, "generated": generated}, tmp_path / "expected.safetensors"
    )
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    worker = Path(__file__).parent.parent / "baselines_worker.py"
    arguments = [
        worker,
        folder,
        tmp_path / "picture.png",
        QUESTION,
        tmp_path / "expected.safetensors",
        tmp_path / "re",
    ]
    result = subprocess.run(
        [sys.executable, "-I", *map(str, arguments)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
    code = [path.name for path in folder.glob("*.py")]
    assert code == ([] if original.system == "convllava" else ["modeling_mobilevlm.py"])
    assert not [path.name for path in folder.iterdir() if path.suffix in {".bin", ".model", ".pt"}]


def test_convllava_takes_the_tower_that_the_authors_loader_takes(tmp_path, words, vocabulary, capsys):
    original = Published(tmp_path, "convllava", words, vocabulary)
    image, command = picture(90, 60), ["convllava", str(original.folder)]
    convert.main([*command, str(tmp_path / "default")])
    convert.main([*command, str(tmp_path / "inside"), "--vision-from-checkpoint"])
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


# ---- Tokens ----


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def speaker(request, tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(words)
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": request.param}))
    tokenizer = load_tokenizer(Source("tokenizer", folder, None, ()))
    return build_processor(tokenizer, 64, 64), request.param


@settings(max_examples=40, deadline=None)
@given(
    turns=st.lists(st.text(st.characters(exclude_characters="<>▁", exclude_categories=["Cs", "Cc"]), min_size=1)
                   .filter(lambda text: text.strip() == text), min_size=1, max_size=5)
    .filter(lambda turns: len(turns) % 2 == 1)
)  # fmt: skip
def test_tokens_are_those_of_the_published_code(speaker, words, turns):
    processor, legacy = speaker
    ids = encode(processor, [conversation(picture(8, 8), turns)])["input_ids"][0].tolist()
    expected = published.token_ids(words, published.prompt(turns), legacy)
    assert ids == [processor.image_token_id if token == -200 else token for token in expected]


def test_answers_are_what_is_learned(speaker):
    processor, _ = speaker
    turns = [QUESTION, "Yes.", "Sure?", "No."]
    made = processor.apply_chat_template(
        [conversation(picture(8, 8), turns)], tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    learned = made["input_ids"][0][torch.as_tensor(made["assistant_masks"][0]).bool()]
    assert processor.tokenizer.decode(learned) == "Yes.</s>No.</s>"


# ---- Full size, without weights ----


class Shapes:
    """Stands in for `Weights`: names and shapes, nothing else."""

    def __init__(self, shapes: dict[str, list[int]], name: str = "published"):
        self.name = name
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}

    def __iter__(self):
        return iter(self.shapes)

    def matching(self, pattern: str) -> tuple[str, ...]:
        return tuple(key for key in self.shapes if re.fullmatch(pattern, key))


VICUNA = {"hidden": 4096, "mlp": 11008, "layers": 32, "vocab": 32000}
MOBILE_LLAMA = {
    "1.7B": {"hidden": 2048, "mlp": 5632, "layers": 24, "vocab": 32000},
    "3B": {"hidden": 2560, "mlp": 6912, "layers": 32, "vocab": 32000},
    "7B": VICUNA,
}
CLIP_L = {"width": 1024, "mlp": 4096, "layers": 24, "patch": 14, "positions": 577}
FIVE_STAGES = ([3, 3, 27, 3, 6], [192, 384, 768, 1536, 3072])


def full_size_folder(folder: Path, llama: dict, **config) -> Source:
    """Configuration and a tokenizer of the published size."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 32000)}
    LlamaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    stated = {
        **LLAVA, "hidden_size": llama["hidden"], "intermediate_size": llama["mlp"],
        "num_hidden_layers": llama["layers"], "num_attention_heads": 32 if llama["hidden"] != 2048 else 16,
        "vocab_size": llama["vocab"], **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stated))
    return Source("published", folder, None, ())


def parameters(shapes: dict) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize(("pixels", "tokens"), [(768, 144), (1024, 256), (1536, 576)])
def test_full_size_convllava(pixels, tokens, tmp_path, monkeypatch):
    depths, widths = FIVE_STAGES
    tower = published.convnext_shapes(depths, widths)
    shapes = published.convllava_shapes(published.llama_shapes(**VICUNA), tower, 3072, 4096)
    # what is known of the published index: its size, and that of the tower
    assert len(shapes) == 695
    assert parameters(tower) == pytest.approx(669.2e6, rel=1e-3)
    assert published.index_bytes(shapes, 2, 2 * parameters(shapes)) == 70_781
    monkeypatch.setattr(convllava, "Weights", lambda source: Shapes(shapes))
    source = full_size_folder(
        tmp_path, VICUNA, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-1, mm_vision_resolution=pixels
    )
    target = convllava.prepare(source, from_checkpoint=True)
    expected = check_names(target)
    assert len(expected) == len(target.origins) == 695 and not target.made and not target.left_out
    config = target.config
    assert (config.image_seq_length, config.image_token_id, config.text_config.vocab_size) == (tokens, 32000, 32064)
    assert (config.vision_config.depths, config.vision_config.hidden_size) == (depths, 3072)
    assert target.processor.patch_size == 64 and target.processor.image_processor.size.shortest_edge == pixels


@pytest.mark.parametrize(("size", "total"), [("1.7B", 1674.1e6), ("3B", 3.0e9), ("7B", 7.1e9)])
def test_full_size_mobilevlm(size, total, tmp_path, monkeypatch):
    llama = MOBILE_LLAMA[size]
    clip = published.clip_shapes(**CLIP_L)
    shapes = published.mobilevlm_shapes(published.llama_shapes(**llama), clip, 1024, llama["hidden"])
    assert parameters(shapes) == pytest.approx(total, rel=0.02)
    if size == "1.7B":
        assert len(shapes) == 616 and parameters(shapes) == pytest.approx(total, rel=1e-4)
    rotary = published.llama_shapes(**llama, rotary=True)
    buffers = {name: shape for name, shape in rotary.items() if name.endswith("inv_freq")}
    if size == "7B":
        assert published.index_bytes(shapes | buffers, 2, 2 * parameters(shapes)) == 76_178
    monkeypatch.setattr(mobilevlm, "Weights", lambda source: Shapes(shapes | buffers))
    source = full_size_folder(
        tmp_path, llama, mm_projector_type="ldpnetv2", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        mm_vision_tower="openai/clip-vit-large-patch14-336",
    )  # fmt: skip
    target = mobilevlm.prepare(source)
    expected = check_names(target)
    assert len(expected) == len(target.origins) == len(shapes) and len(target.left_out) == llama["layers"]
    vision = target.config.vision_config
    assert (vision.image_size, vision.num_attention_heads, vision.num_hidden_layers) == (336, 16, 24)
    assert target.config.image_seq_length == 144 and target.processor.patch_size == 28
    projector = sum(shape.numel() for name, shape in expected.items() if "multi_modal_projector" in name)
    assert size != "1.7B" or projector == pytest.approx(6.316e6, rel=1e-3)


# ---- Writing ----


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
    convert.write_weights(target, tmp_path, shard_size="200KB", progress=False)
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


def test_checkpoint_and_tower_come_from_the_hub_at_a_revision(tmp_path, words, vocabulary):
    """Through the command, in a process that knows this Hub alone; pickles stay where they are unless asked for."""
    original = Published(tmp_path, "convllava", words, vocabulary, bins=True)
    (original.folder / "config.json").write_text(json.dumps({**original.config, "mm_vision_tower": "a/tower"}))
    command = ["convert", "convllava", "a/convllava", str(tmp_path / "out")]
    with HubServer(tmp_path / "hub") as hub:
        commit = hub.add_repo("a/convllava", original.folder).find("main").oid
        hub.add_repo("a/tower", tmp_path / "tower")
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": hub.address, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        script = (
            "import sys\nfrom agevlm.cli import main\n"
            "flags = sys.argv[1:]\n"
            "for more in ([], ['--read-bin', '--revision', 'main']):\n"
            "    sys.argv = ['agevlm', *flags, *more]\n"
            "    try:\n        main()\n    except SystemExit as error:\n        print('left with', error.code)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=240, env=environment
        )
    assert "left with 2" in run.stdout and "Or pass `--read-bin`" in run.stderr, run.stderr[-2000:]
    record = json.loads((tmp_path / "out" / "agevlm_conversion.json").read_text())
    assert record["revision"] == commit and record["vision_tower"]["source"] == "a/tower"


# ---- Refusals ----


@pytest.fixture
def small(tmp_path, words, vocabulary) -> Published:
    return Published(tmp_path, "mobilevlm-v2", words, vocabulary)


def refuse(command: list, message: str, output: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert.main([*map(str, command), str(output)])
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
         r"of another shape: model\.mm_projector\.mlp\.mlp\.2\.weight \[32, 5\] instead of \[32, 32\]"),
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


def test_the_other_system_is_refused(small, tmp_path):
    refuse(["convllava", small.folder], "mm_projector_type", tmp_path / "out")


def test_pickles_are_read_only_when_asked_for_and_only_for_tensors(tmp_path, words, vocabulary):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    original = Published(tmp_path, "mobilevlm-v2", words, vocabulary, bins=True)
    command = ["mobilevlm-v2", original.folder]
    refuse(command, r"only as pytorch_model.*Or pass `--read-bin`", tmp_path / "out")
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
    convert.main([*map(str, command), str(tmp_path / "out"), "--read-bin"])
    record = json.loads((tmp_path / "out" / "agevlm_conversion.json").read_text())
    assert record["read_with"] == "torch.load(weights_only=True)" and record["left_out"] == LAYERS


def test_a_tower_that_cannot_be_had_says_what_to_do(tmp_path, words, vocabulary, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original = Published(tmp_path, "convllava", words, vocabulary)
    (original.folder / "config.json").write_text(json.dumps({**original.config, "mm_vision_tower": "/gone/tower"}))
    refuse(["convllava", original.folder], "--vision-tower.*--vision-from-checkpoint", tmp_path / "out")


def test_a_folder_in_use_and_a_killed_run(small, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        convert.main(["mobilevlm-v2", str(small.folder), str(tmp_path / "used")])
    assert (tmp_path / "used" / "file").read_text() == "mine"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        convert.main(["mobilevlm-v2", str(small.folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.incomplete").exists()
