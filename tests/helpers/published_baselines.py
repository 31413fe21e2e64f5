"""ConvLLaVA and MobileVLM V2 as their repositories publish them, at any size, and what their code makes of a question.

Written from the published description (names, sizes, order of operations), not from `agevlm.conversion`: towers and
language model are transformers' own classes under the original names; preprocessing, prompt, projectors and the
splice of picture into text stand here in plain PIL, sentencepiece and torch.
"""

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import is_torchvision_available


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
CORPUS = [
    SYSTEM,
    "USER: Is there a red apple in the image? ASSISTANT: Yes, there is a red apple.",
    "USER: How many cars are there?\nAnswer with a single word. ASSISTANT: two",
    "What is the colour of the car on the left of the yellow house? blue green",
]
Shapes = dict[str, list[int]]


# ---- Names and shapes ----
#
# Towers and language model have transformers' names; `test_full_size.py` holds them against the sizes of the published
# files.


def shapes_of(model_class: type[torch.nn.Module], config) -> Shapes:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def llama_shapes(hidden: int, mlp: int, layers: int, vocab: int, rotary: bool = False) -> Shapes:
    """A Llama with as many key and value heads as query heads; `rotary`: with the buffers of older versions."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=4, vocab_size=vocab
    )
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": [64] for layer in range(layers)}
    return shapes_of(LlamaForCausalLM, config) | (buffers if rotary else {})


def convnext(depths: list[int], widths: list[int]) -> ConvNextConfig:
    return ConvNextConfig(num_stages=len(depths), depths=depths, hidden_sizes=widths)


def clip(width: int, mlp: int, layers: int, heads: int, patch: int, size: int) -> CLIPVisionConfig:
    """OpenAI's ViT."""
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=size, patch_size=patch, hidden_act="quick_gelu",
    )  # fmt: skip


def system_shapes(llama: Shapes, tower: ConvNextConfig | CLIPVisionConfig) -> Shapes:
    """A whole checkpoint: ConvLLaVA's around a ConvNeXt, MobileVLM's around a ViT."""
    hidden = llama["model.embed_tokens.weight"][1]
    if isinstance(tower, ConvNextConfig):
        own, mlp, width = shapes_of(ConvNextModel, tower), "", tower.hidden_sizes[-1]
    else:
        own, mlp, width = shapes_of(CLIPVisionModel, tower), "mlp.mlp.", tower.hidden_size
        own = {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in own.items()}
    at = "model.mm_projector"
    projector = {
        f"{at}.{mlp}0.weight": [hidden, width], f"{at}.{mlp}0.bias": [hidden],
        f"{at}.{mlp}2.weight": [hidden, hidden], f"{at}.{mlp}2.bias": [hidden],
    }  # fmt: skip
    if mlp:
        projector |= {f"{at}.peg.peg.0.weight": [hidden, 1, 3, 3], f"{at}.peg.peg.0.bias": [hidden]}
    return llama | {f"model.vision_tower.vision_tower.{name}": shape for name, shape in own.items()} | projector


def index_bytes(shapes: Shapes, shards: int, total_size: int) -> int:
    """Size of the index file that `save_pretrained` wrote beside that many shards."""
    names = {name: f"pytorch_model-00001-of-{shards:05}.bin" for name in shapes}
    index = {"metadata": {"total_size": total_size}, "weight_map": names}
    return len(json.dumps(index, indent=2, sort_keys=True)) + 1


# ---- Folders ----


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that leave no branch without effect: norms around 1, LayerScale of a visible size, biases that count."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.3 * noise
        else:
            weights[name] = noise * torch.tensor(shape[1:]).prod() ** -0.5
    return weights


def sentencepiece_model() -> bytes:
    """A BPE model with Llama's conventions: byte fallback, a dummy prefix, no normalisation, <unk> <s> </s> first."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=written, model_type="bpe", vocab_size=400, byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        allow_whitespace_only_pieces=True, split_digits=True, hard_vocab_limit=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def save_folder(
    folder: Path, weights: dict[str, torch.Tensor], config: dict, tokenizer: bytes | None = None, bins: bool = False
) -> Path:
    """Two shards with their index, configuration and tokenizer, as published."""
    folder.mkdir(parents=True)
    names = sorted(weights)
    stem, suffix = ("pytorch_model", "bin") if bins else ("model", "safetensors")
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        shard = {name: weights[name] for name in part}
        torch.save(shard, folder / file) if bins else save_file(shard, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False})
        )
    return folder


# ---- What their code does ----


def square(picture: Image.Image) -> Image.Image:
    """On the mean colour, centred."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in MEAN))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def pixels(picture: Image.Image, size: int, pillow: bool = not is_torchvision_available()) -> torch.Tensor:
    """(1, 3, size, size). The authors' are Pillow's; transformers resizes with torchvision where it is installed,
    which rounds some pixels another way."""
    canvas = square(picture)
    if pillow:
        resized = torch.from_numpy(np.array(canvas.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    else:
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        resized = resize(torch.from_numpy(np.array(canvas)).permute(2, 0, 1), [size, size], InterpolationMode.BICUBIC)
    scaled = resized.numpy().astype(np.float32) / 255
    return torch.from_numpy((scaled - MEAN[:, None, None]) / STD[:, None, None])[None]


def prompt(turns: list[str], picture: bool = True) -> str:
    """User's and assistant's turns in alternation, the picture before the first, up to the next answer."""
    text = SYSTEM + " "
    for number, turn in enumerate(turns):
        question = f"<image>\n{turn}" if number == 0 and picture else turn
        text += f"USER: {question} " if number % 2 == 0 else f"ASSISTANT: {turn}</s>"
    return text + "ASSISTANT:"


def token_ids(model: bytes, text: str, legacy: bool = False) -> list[int]:
    """-200 for the picture; each piece beside it is tokenized as a text of its own."""
    words = sentencepiece.SentencePieceProcessor(model_proto=model)

    def piece(text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split("</s>")):
            ids += [2] if number else []
            if number and not legacy:  # behind a special token no space is put before the text; a tab joins nothing
                ids += words.encode("\t" + part)[len(words.encode("\t")) :] if part else []
            else:
                ids += words.encode(part) if part else []
        return ids

    first, *rest = text.split("<image>")
    return [1, *piece(first)] + [token for part in rest for token in (-200, *piece(part))]


def splice(language: LlamaForCausalLM, ids: list[int], picture: torch.Tensor) -> torch.Tensor:
    """Embeddings (1, tokens, width) with the picture's tokens (1, cells, width) in place of -200."""
    at = ids.index(-200)
    words = language.get_input_embeddings()
    before, after = (words(torch.tensor([part], dtype=torch.long)) for part in (ids[:at], ids[at + 1 :]))
    return torch.cat([before, picture, after], dim=1)


def load_part(model: torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str = "") -> torch.nn.Module:
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    result = model.load_state_dict(own, strict=False)
    assert not [name for name in result.missing_keys if not name.startswith("layernorm.")], result.missing_keys
    return model.eval()


def llama(weights: dict[str, torch.Tensor], config: dict) -> LlamaForCausalLM:
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
              "rms_norm_eps", "max_position_embeddings")  # fmt: skip
    own = {name: value for name, value in weights.items() if "vision_tower" not in name and "mm_projector" not in name}
    own = {name: value for name, value in own.items() if "inv_freq" not in name}
    return load_part(LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in fields})), own)


def project(weights: dict, at: str, states: torch.Tensor) -> torch.Tensor:
    """The two linear layers `at`.0 and `at`.2 with GELU between them."""
    hidden = F.gelu(states @ weights[f"{at}.0.weight"].T + weights[f"{at}.0.bias"])
    return hidden @ weights[f"{at}.2.weight"].T + weights[f"{at}.2.bias"]


def convllava_picture(weights: dict, tower: dict, config: ConvNextConfig, pixels: torch.Tensor):
    """The map of the last stage before any norm, row by row, through `mlp2x_gelu`."""
    convnext = load_part(ConvNextModel(config), tower)
    cells = convnext.encoder(convnext.embeddings(pixels)).last_hidden_state
    return project(weights, "model.mm_projector", cells.flatten(2).transpose(1, 2))


def mobilevlm_picture(weights: dict, config: CLIPVisionConfig, pixels: torch.Tensor):
    """The last but one layer without its class token, through LDPv2: 24 x 24 averaged in fours to 12 x 12, and a
    depthwise 3 x 3 that is added."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    clip = load_part(CLIPVisionModel(config), weights, prefix)
    tokens = clip(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    hidden = project(weights, "model.mm_projector.mlp.mlp", tokens)
    width = hidden.shape[-1]
    grid = hidden.reshape(12, 2, 12, 2, width).mean(dim=(1, 3))  # rows, columns, width
    kernel, bias = weights["model.mm_projector.peg.peg.0.weight"], weights["model.mm_projector.peg.peg.0.bias"]
    framed = F.pad(grid.permute(2, 0, 1), (1, 1, 1, 1)).permute(1, 2, 0)
    added = sum(framed[i : i + 12, j : j + 12] * kernel[:, 0, i, j] for i in range(3) for j in range(3)) + bias
    return (grid + added).reshape(1, 144, width)
