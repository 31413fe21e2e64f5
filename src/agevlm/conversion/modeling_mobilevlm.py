"""MobileVLM V2 (Table 2's baseline): transformers' Llava with the projector LDPv2. Travels with every checkpoint.

A CLIP ViT makes 24 x 24 tokens, LDPv2 a quarter of them, which stand in the prompt in place of the `<image>` tokens.
Splicing, cache and generation are Llava's own. The model type is its own too: as `llava` the checkpoint would load
into the stock class, whose projector is another one.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.activations import ACT2FN


AUTO_MAP = {
    "AutoConfig": "modeling_mobilevlm.MobileVlmConfig",
    "AutoModelForImageTextToText": "modeling_mobilevlm.MobileVlmForConditionalGeneration",
}


class MobileVlmConfig(LlavaConfig):
    """Llava's configuration; `image_seq_length` is the number of tokens that LDPv2 leaves of a picture, a square."""

    model_type = "mobilevlm_v2"

    def __post_init__(self, **kwargs: Any):
        kwargs["auto_map"] = dict(AUTO_MAP)  # what a loaded file says of other code does not travel on
        super().__post_init__(**kwargs)
        if math.isqrt(self.image_seq_length) ** 2 != self.image_seq_length:
            raise ValueError(f"`image_seq_length` must be a square (published: 12 x 12), got {self.image_seq_length}.")


class LdpV2Projector(nn.Module):
    """Two linear layers for each token, an average over the grid down to fewer cells, and a depthwise convolution
    around which the cells pass unchanged: it tells them where they are (MobileVLM V2, section 3.3)."""

    def __init__(self, config: MobileVlmConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)
        self.pool = nn.AdaptiveAvgPool2d(math.isqrt(config.image_seq_length))
        self.peg = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(images, cells, vision width), the cells a square row by row -> (images, image_seq_length, text width)."""
        hidden_NLD = self.linear_2(self.act(self.linear_1(image_features)))
        side = math.isqrt(hidden_NLD.shape[1])
        grid_NDHW = self.pool(hidden_NLD.transpose(1, 2).unflatten(2, (side, side)))
        grid_NDHW = grid_NDHW + self.peg(grid_NDHW)
        return grid_NDHW.flatten(2).transpose(1, 2)


class MobileVlmModel(LlavaModel):
    """Llava's backbone with the other projector."""

    config: MobileVlmConfig

    def __init__(self, config: MobileVlmConfig):
        super().__init__(config)
        self.multi_modal_projector = LdpV2Projector(config)
        self.post_init()


class MobileVlmForConditionalGeneration(LlavaForConditionalGeneration):
    """Llava around `MobileVlmModel`."""

    config: MobileVlmConfig

    def __init__(self, config: MobileVlmConfig):
        LlavaPreTrainedModel.__init__(self, config)  # Llava's own would build its backbone first
        self.model = MobileVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


MobileVlmConfig.register_for_auto_class()
MobileVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MobileVlmConfig", "MobileVlmForConditionalGeneration", "MobileVlmModel"]
