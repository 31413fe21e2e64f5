"""An AGE-VLM from its pretrained parts: a Llama, a ConvNeXt, and fresh projector and cross blocks (section 4).

Never shipped with a checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ConvNextModel, LlamaForCausalLM, PreTrainedConfig

from agevlm.modeling_agevlm.configuration_agevlm import AgeVlmConfig
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration


def spread_cross_attention_layers(num_hidden_layers: int) -> list[int]:
    """The paper's rule for any depth: a cross block after 2 layers and then after every 4 more.

    16 layers give the paper's [2, 7, 12, 17] (indices of the interleaved stack).
    """
    return [after + index for index, after in enumerate(range(min(2, num_hidden_layers), num_hidden_layers, 4))]


def _without_path(config: PreTrainedConfig) -> dict[str, Any]:
    """The configuration as a dictionary, without the folder it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def assemble(
    language_model: LlamaForCausalLM,
    vision_tower: ConvNextModel,
    image_token_id: int,
    cross_attention_layers: Sequence[int] | None = None,
    **config,
) -> AgeVlmForConditionalGeneration:
    """Build a model around copies of two pretrained parts.

    Args:
        language_model, vision_tower: the parts; their weights are copied.
        image_token_id: id of the image placeholder; inside the language model's vocabulary.
        cross_attention_layers: indices in the interleaved stack. Default: [`spread_cross_attention_layers`].
        **config: further fields of [`AgeVlmConfig`].

    Returns:
        The model in float32: pretrained parts, random projector, cross blocks that pass everything through.

    Raises:
        ValueError: the placeholder has no row in the embedding.
    """
    text_config = language_model.config
    if not 0 <= image_token_id < text_config.vocab_size:
        raise ValueError(
            f"`image_token_id` {image_token_id} is outside the vocabulary of {text_config.vocab_size}: resize the "
            "language model's embeddings to the tokenizer first (`resize_token_embeddings`)."
        )
    if cross_attention_layers is None:
        cross_attention_layers = spread_cross_attention_layers(text_config.num_hidden_layers)
    model = AgeVlmForConditionalGeneration(
        AgeVlmConfig(
            vision_config=_without_path(vision_tower.config),
            # Fresh weights keep the size of what passes through them at any width. At Llama-1B's 2048 this is the
            # usual 0.02; at 128 that would let a picture arrive at a hundredth of its size.
            text_config={**_without_path(text_config), "initializer_range": text_config.hidden_size**-0.5},
            cross_attention_layers=list(cross_attention_layers),
            image_token_id=image_token_id,
            **config,
        )
    ).to(torch.float32)
    tower = {name: value for name, value in vision_tower.state_dict().items() if not name.startswith("layernorm.")}
    model.model.vision_tower.load_state_dict(tower)
    loaded = model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=False)
    missing = [name for name in loaded.missing_keys if not name.startswith("cross_attention_layers.")]
    if missing or loaded.unexpected_keys:
        raise ValueError(f"The language model does not fit: missing {missing}, unexpected {loaded.unexpected_keys}.")
    if not text_config.tie_word_embeddings:
        model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    model.generation_config.update(**language_model.generation_config.to_diff_dict())
    return model
