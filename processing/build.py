"""A processor around any tokenizer. Never shipped with a checkpoint.

The language model stays frozen for three stages, so prompts use only chat tokens that it knows: tokenizers with
ChatML's turn tokens (SmolLM2, Qwen) get ChatML's template, those with one token a role (our tiny parts) the short one,
all others Llama-3's, whose tokens are added where they are missing.
"""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from . import AgeVlmImageProcessor
from .processing_agevlm import AgeVlmProcessor


IMAGE_TOKEN = "<|image|>"
RESERVED = "<|reserved_special_token_"


class ChatStyle(NamedTuple):
    """The tokens of a chat template, the last of which ends a turn, and the template's file."""

    name: str
    tokens: tuple[str, ...]
    template: str

    @property
    def end_of_turn(self) -> str:
        return self.tokens[-1]


LLAMA3 = ChatStyle("Llama-3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "chat_template.jinja")
CHATML = ChatStyle("ChatML", ("<|im_start|>", "<|im_end|>"), "chat_template_chatml.jinja")
SHORT = ChatStyle(
    "one token a role", ("<|system|>", "<|user|>", "<|assistant|>", "<|eot_id|>"), "chat_template_short.jinja"
)


def chat_style(tokenizer: PreTrainedTokenizerFast) -> ChatStyle:
    """ChatML or the short style where the tokenizer has all of its tokens, else Llama-3's."""
    vocabulary = set(tokenizer.get_vocab())
    return next((style for style in (CHATML, SHORT) if vocabulary.issuperset(style.tokens)), LLAMA3)


def with_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with the image placeholder and the chat template's tokens.

    Where there are reserved special tokens (Llama-3), the last one is renamed, so that the vocabulary keeps its size
    and no embedding is resized. Otherwise the tokens are added: resize the model's embeddings to `len(tokenizer)`.

    The end-of-sequence token becomes the one that ends the template's turns. Trainer passes it on to the generation
    config; with the tokenizer's own one, generation would run past the end of every answer.
    """
    vocabulary = tokenizer.get_vocab()
    reserved = sorted((token for token in vocabulary if token.startswith(RESERVED)), key=vocabulary.get)
    if IMAGE_TOKEN not in vocabulary and reserved:
        # Renamed in the serialized form: every place that names the token changes with it.
        text = tokenizer.backend_tokenizer.to_str().replace(f'"{reserved[-1]}"', f'"{IMAGE_TOKEN}"')
        settings = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(text), model_max_length=tokenizer.model_max_length, **settings
        )
    style = chat_style(tokenizer)
    missing = [token for token in (IMAGE_TOKEN, *style.tokens) if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or style.end_of_turn
    tokenizer.eos_token = style.end_of_turn
    return tokenizer


def build_processor(
    tokenizer: PreTrainedTokenizerFast, image_size: int = 768, geometry: str = "pad"
) -> AgeVlmProcessor:
    """A processor for square pictures of `image_size` pixels (a multiple of 32), padding on the left.

    Raises:
        ValueError: an image size that is no multiple of 32, or an unknown geometry.
    """
    image_processor = AgeVlmImageProcessor(size={"height": image_size, "width": image_size}, geometry=geometry)
    if image_size % image_processor.cell_size:
        raise ValueError(f"`image_size` must be a multiple of {image_processor.cell_size}, got {image_size}.")
    tokenizer = with_image_token(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what is saved
    template = Path(__file__).with_name(chat_style(tokenizer).template).read_text(encoding="utf-8")
    tokenizer.chat_template = template
    return AgeVlmProcessor(image_processor, tokenizer, chat_template=template)
