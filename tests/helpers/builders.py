"""The one builder of everything tiny that the tests use: tokenizer, processor, model, pictures, rows."""

import functools
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agevlm.data.scenes.build import build_scenes
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.processing.build import build_processor


SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|pad|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
]
CORPUS = [
    "Is there a red apple in the image? Yes No",
    "How many cars are in the image? Describe the image.",
    "A blue car and a green tree on the left of a yellow house.",
    "system user assistant",
]
IMAGE_SIZE = 96  # a grid of 3 x 3 visual tokens
IMAGE, QUESTION = "<|image|>", "Is there a red apple in the image?"
TEXT_KEYS = {"input_ids", "attention_mask"}
IMAGE_KEYS = {"pixel_values", "image_mask", "visual_token_mask", "cross_attention_mask"}
CHAT = [
    {"role": "system", "content": "A blue car"},
    {"role": "user", "content": IMAGE + QUESTION},
    {"role": "assistant", "content": "No"},
    {"role": "user", "content": "And now? " + QUESTION},
    {"role": "assistant", "content": "Yes\n\nThere is."},
]


def train_tokenizer(texts: list[str], special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of 400 tokens or more, line breaks apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@functools.cache
def _trained_tokenizer() -> str:
    return train_tokenizer(CORPUS, SPECIAL_TOKENS).to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Llama-3's special tokens, two of them reserved."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )


def tiny_processor(image_size: int = IMAGE_SIZE, geometry: str = "pad"):
    """A processor around [`tiny_tokenizer`]."""
    return build_processor(tiny_tokenizer(), image_size=image_size, geometry=geometry)


def tiny_model(seed: int = 0, open_cross_blocks: bool = True, **config) -> AgeVlmForConditionalGeneration:
    """A random model of some 90,000 parameters with 4 text layers and 2 cross blocks, in eval mode.

    Args:
        open_cross_blocks: give the zero-initialised output projections random weights, and the tower's LayerScale a
            visible size. Closed (as built), pictures change nothing and a test of them proves nothing.
    """
    tokenizer = tiny_processor().tokenizer
    torch.manual_seed(seed)
    model = AgeVlmForConditionalGeneration(
        AgeVlmConfig.tiny(
            vocab_size=len(tokenizer),
            image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
            text_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                **config.pop("text_config", {}),
            },
            vision_config={"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]},
            **config,
        )
    )
    if open_cross_blocks:
        with torch.no_grad():
            for block in model.model.language_model.cross_attention_layers:
                block.cross_attn.o_proj.weight.normal_(std=0.3)
                block.mlp.down_proj.weight.normal_(std=0.3)
            for name, parameter in model.model.vision_tower.named_parameters():
                if name.endswith("layer_scale_parameter"):
                    parameter.normal_(std=0.5)
    return model.eval()


def save_tiny(folder: Path, model=None, processor=None) -> Path:
    """A checkpoint of [`tiny_model`] and [`tiny_processor`], or of others; returns its folder."""
    (model or tiny_model()).save_pretrained(folder)
    (processor or tiny_processor()).save_pretrained(folder)
    return folder


def tiny_batch(model: AgeVlmForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Three rows of ten tokens for [`tiny_model`]: one picture with padded cells, text alone, two pictures."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(20, 200, (3, 10), generator=generator)
    input_ids[0, 2] = input_ids[2, 1] = input_ids[2, 5] = model.config.image_token_id
    visual_token_mask = torch.ones(3, 2, 9, dtype=torch.bool)
    visual_token_mask[0, 0, :3] = False
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(3, 2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "image_mask": torch.tensor([[True, False], [False, False], [True, True]]),
        "visual_token_mask": visual_token_mask,
    }


def tiny_scenes(folder: Path, **changes) -> Path:
    """Scenes with a few rows of training, and one question of each benchmark in one split; returns their folder."""
    few = {"captions": 4, "instructions": 4, "test": 1, "size": 64, "splits": ("composition",), "progress": False}
    return build_scenes(folder, **{**few, **changes})


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two batches, or two sets of weights, are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def picture(width: int = IMAGE_SIZE, height: int = IMAGE_SIZE, seed: int = 0) -> Image.Image:
    """A picture of random noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask(width: int = IMAGE_SIZE, height: int = IMAGE_SIZE, box: tuple[int, int, int, int] = (0, 0, 40, 40)):
    """A 1-bit mask that is set inside `box` (left, top, right, bottom)."""
    image = Image.new("1", (width, height))
    image.paste(1, box)
    return image


def stored(image: Image.Image) -> dict:
    """A picture as an undecoded column of pictures holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(row_id: str = "row-0", images: int = 1, guided: bool = False, seed: int = 0) -> dict:
    """A valid row: one question and answer about `images` pictures."""
    return {
        "id": row_id,
        "images": [picture(seed=seed + index) for index in range(images)],
        "messages": [
            {"role": "user", "content": IMAGE * images + QUESTION},
            {"role": "assistant", "content": "Yes"},
        ],
        "guidance": {"query": QUESTION, "message_index": 0, "mask": mask(), "source": "test", "score": 1.0}
        if guided
        else None,
    }
