"""Configuration of AGE-VLM (paper section 3.2.1).

A ConvNeXt tower, a projector of two linear layers and a Llama decoder with interleaved cross-attention blocks.

Readings of the paper that the fields encode:
- `cross_attention_layers` counts the interleaved stack (Llama's own layers plus the cross blocks), as Mllama does:
  with 16 + 4 = 20 layers the paper's 2, 7, 12 and 17 exist. `text_config` stays the untouched Llama configuration.
- Eq. 2 has no gate on the cross block and no norm on queries and keys; both exist as switches (`mllama()` sets them).
"""

import copy
from typing import Any, Literal

from .compatibility_agevlm import MINIMUM, sub_config_specs


# isort: split
from huggingface_hub.dataclasses import strict
from transformers import ConvNextConfig, LlamaConfig, PreTrainedConfig


# Everything that `trust_remote_code=True` may ask a checkpoint folder for. `save_pretrained` alone would only name the
# class that was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_agevlm.AgeVlmConfig",
    "AutoModel": "modeling_agevlm.AgeVlmForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_agevlm.AgeVlmForConditionalGeneration",
    "AutoProcessor": "processing_agevlm.AgeVlmProcessor",
}

# The ConvNeXt-L of LAION's CLIP
VISION_DEFAULTS = {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536], "layer_norm_eps": 1e-6}
# Llama-3.2-1B
TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "pad_token_id": 128004,
}


def _part(name: str, config_class: Any, given: Any, defaults: dict[str, Any]) -> PreTrainedConfig:
    """The field `name` as a configuration of `config_class`, whether given as one, as a dictionary or not at all.

    Raises:
        ValueError: it is of another architecture.
    """
    given = copy.deepcopy(defaults) if given is None else given  # no two configurations share a list or dictionary
    if isinstance(given, dict):
        found = given.get("model_type", config_class.model_type)
    else:
        found = getattr(given, "model_type", type(given).__name__)
    if found != config_class.model_type:
        raise ValueError(f"`{name}` must be of type '{config_class.model_type}', got '{found}'.")
    return config_class(**given) if isinstance(given, dict) else given


@strict
class AgeVlmConfig(PreTrainedConfig):
    """Configuration of [`AgeVlmForConditionalGeneration`].

    Args:
        vision_config (`ConvNextConfig` or `dict`): the tower; defaults to the ConvNeXt-L of LAION's CLIP.
        text_config (`LlamaConfig` or `dict`): any Llama-family decoder; defaults to the sizes of Llama-3.2-1B.
        cross_attention_layers (`list[int]`): indices of the cross blocks in the interleaved stack, ascending.
            Defaults to the paper's `[2, 7, 12, 17]`.
        image_token_id (`int`): id of the placeholder token that marks the place of an image. Defaults to Llama-3's
            last reserved special token.
        cross_attention_gate (`"none"` or `"tanh"`): `"tanh"` scales both branches of a cross block by the tanh of a
            learned scalar that starts at 0 (Mllama). `"none"` (Eq. 2) starts the output projections at 0 instead.
        cross_attention_position (`"after_layer"` or `"after_self_attention"`): whether a cross block follows a whole
            Llama layer (Mllama, and the reading of the paper's indices) or stands between that layer's self-attention
            and its MLP (the text of section 3.2.1).
        cross_attention_qk_norm (`bool`): RMSNorm on the heads of queries and keys, as Mllama.
        projector_hidden_act (`str`): the activation between the projector's two linear layers.

    Raises:
        ValueError: a sub-configuration of another architecture, or cross-attention layers that do not fit the stack.
    """

    model_type = "agevlm"
    sub_configs = {"vision_config": ConvNextConfig, "text_config": LlamaConfig}  # noqa: RUF012
    sub_configs_defaults = sub_config_specs(
        vision_config=(ConvNextConfig, VISION_DEFAULTS), text_config=(LlamaConfig, TEXT_DEFAULTS)
    )

    # dict | PreTrainedConfig | None when given; always a configuration afterwards
    vision_config: Any = None
    text_config: Any = None
    cross_attention_layers: list[int] | tuple[int, ...] = (2, 7, 12, 17)
    image_token_id: int = 128255
    cross_attention_gate: Literal["none", "tanh"] = "none"
    cross_attention_position: Literal["after_layer", "after_self_attention"] = "after_layer"
    cross_attention_qk_norm: bool = False
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = dict(AUTO_MAP)  # what a loaded file says of other code does not travel on
        self.vision_config = _part("vision_config", ConvNextConfig, self.vision_config, VISION_DEFAULTS)
        self.text_config = _part("text_config", LlamaConfig, self.text_config, TEXT_DEFAULTS)
        self.cross_attention_layers = list(self.cross_attention_layers)
        super().__post_init__(**kwargs)
        # The head belongs to the decoder: whether it is tied is the decoder's decision.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        # `@strict` runs it again and would wrap the error into a type that is no ValueError.
        self.validate_architecture()

    def to_dict(self) -> dict[str, Any]:
        # What is needed, not what happens to be installed where it is saved
        return {**super().to_dict(), "transformers_version": MINIMUM}

    def validate_architecture(self):
        """Part of the `@strict` validation, which also runs before saving.

        Raises:
            ValueError: see the class.
        """
        layers = list(self.cross_attention_layers)
        depth = self.text_config.num_hidden_layers + len(layers)
        if layers != sorted(set(layers)) or any(not 0 <= layer < depth for layer in layers):
            raise ValueError(
                f"`cross_attention_layers` must be ascending, distinct and inside the interleaved stack of "
                f"{self.text_config.num_hidden_layers} + {len(layers)} = {depth} layers (0 to {depth - 1}), "
                f"got {layers}."
            )
        if self.cross_attention_position == "after_self_attention" and 0 in self.cross_attention_schedule:
            raise ValueError(
                f"`cross_attention_layers` {layers} puts a cross block before the first Llama layer; with "
                "`cross_attention_position` 'after_self_attention' each one needs a layer to stand in: start at 1."
            )

    @property
    def cross_attention_schedule(self) -> list[int]:
        """For each cross block, the number of Llama layers that run before it: [2, 6, 10, 14] for the paper."""
        return [layer - index for index, layer in enumerate(self.cross_attention_layers)]

    @classmethod
    def paper(cls, **kwargs) -> "AgeVlmConfig":
        """The paper's model: ConvNeXt-L, Llama-3.2-1B, cross blocks at 2, 7, 12 and 17."""
        return cls(**kwargs)

    @classmethod
    def mllama(cls, **kwargs) -> "AgeVlmConfig":
        """The paper's sizes with Mllama's cross block: tanh gates and norms on queries and keys."""
        return cls(cross_attention_gate="tanh", cross_attention_qk_norm=True, **kwargs)

    @classmethod
    def tiny(cls, vocab_size: int, image_token_id: int, **kwargs) -> "AgeVlmConfig":
        """A model of about 2 million parameters that trains in minutes on two CPU cores.

        Args:
            vocab_size (`int`): size of the tokenizer's vocabulary.
            image_token_id (`int`): id of the image placeholder in that tokenizer.
        """
        text = {
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "initializer_range": 128**-0.5,  # 0.02 is for widths of 2048: here it would drown what passes through
            "tie_word_embeddings": True,
        }
        vision = {"depths": [1, 1, 3, 1], "hidden_sizes": [24, 48, 96, 192], "layer_norm_eps": 1e-6}
        return cls(
            text_config={"model_type": "llama", **text, **kwargs.pop("text_config", {})},
            vision_config={"model_type": "convnext", **vision, **kwargs.pop("vision_config", {})},
            cross_attention_layers=kwargs.pop("cross_attention_layers", [1, 4]),
            image_token_id=image_token_id,
            **kwargs,
        )


AgeVlmConfig.register_for_auto_class()

__all__ = ["AgeVlmConfig"]
