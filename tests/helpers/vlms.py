"""Tiny random models of transformers' own vision-language classes, with processors built offline."""

import torch
from tokenizers import AddedToken
from transformers import (
    ConvNextConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from agevlm.analysis.subjects import Subject
from builders import tiny_model, tiny_processor, tiny_tokenizer


# Those that transformers loads from a folder: they round pixels differently.
if is_torchvision_available():
    from transformers import Idefics3ImageProcessor, LlavaImageProcessor
else:
    from transformers import Idefics3ImageProcessorPil as Idefics3ImageProcessor
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "pad_token_id": 2,
}


class StillQwenProcessor(Qwen2_5_VLProcessor):
    """Without its video half, which needs torchvision; pictures go the same way."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _tokenizer(*special: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token, special=True) for token in special]})
    return tokenizer


def _text(tokenizer, **changes) -> dict:
    return {**TEXT, "vocab_size": len(tokenizer), **changes}


def llava(do_pad: bool = False) -> Subject:
    """CLIP on a canvas of 24 x 24, patches of 8: 3 x 3 tokens."""
    tokenizer = _tokenizer("<image>")
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 24, "patch_size": 8, "projection_dim": 16,
        },
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
    )  # fmt: skip
    images = LlavaImageProcessor(
        do_pad=do_pad, size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_center_crop=True
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image> \n"), image_token="<image>",
    )  # fmt: skip
    torch.manual_seed(0)
    return Subject(LlavaForConditionalGeneration(config).eval(), processor)


def fast_vlm() -> Subject:
    """A ConvNeXt tower on a canvas of 96 x 96: 3 x 3 tokens (the layout of ConvLLaVA)."""
    tokenizer = _tokenizer("<image>")
    vision = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16]).to_dict() | {"hidden_size": 16}
    config = FastVlmConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
    )
    images = LlavaImageProcessor(do_pad=True, size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=32, vision_feature_select_strategy="full", num_additional_image_tokens=0,
        chat_template=TEMPLATE.replace("IMAGE", "<image>\n"), image_token="<image>",
    )  # fmt: skip
    torch.manual_seed(0)
    return Subject(FastVlmForConditionalGeneration(config).eval(), processor)


def smolvlm() -> Subject:
    """SigLIP on tiles of 32 x 32, patches of 8 shuffled 2 x 2: 2 x 2 tokens per tile, and the whole picture."""
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
                           *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)))  # fmt: skip
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        text_config={"model_type": "llama", **_text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=2,
    )  # fmt: skip
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = TEMPLATE.replace("IMAGE", "<image>")
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    torch.manual_seed(0)
    return Subject(SmolVLMForConditionalGeneration(config).eval(), processor)


def qwen() -> Subject:
    """Qwen2.5-VL: patches of 8 merged 2 x 2, a token per 16 x 16 pixels of the resized picture."""
    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "window_size": 32,
            "fullatt_block_indexes": [1], "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config=_text(tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1],
                                                      "rope_theta": 10000.0}),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16 * 4, "longest_edge": 64 * 64}
    )
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    torch.manual_seed(0)
    return Subject(
        Qwen2_5_VLForConditionalGeneration(config).eval(),
        StillQwenProcessor(images, tokenizer, chat_template=template),
    )


def ours() -> Subject:
    return Subject(tiny_model(), tiny_processor())


CONCATENATING = {
    "llava": llava,
    "llava-pad": lambda: llava(do_pad=True),
    "fast_vlm": fast_vlm,
    "smolvlm": smolvlm,
    "qwen": qwen,
}
EVERY = {"ours": ours, **CONCATENATING}


def force(subject, token: int) -> None:
    """Queries and keys of every layer that looks: all on one visual token. In the slowest rotary pair, which turns by
    a thousandth per token."""
    width = 8

    def spread(output, places):
        states = torch.zeros_like(output).unflatten(-1, (-1, width))
        states[:, places, :, width // 2 - 1] = 20.0
        return states.flatten(-2)

    for module in subject.attention.values():
        places = [token]

        def key(_, __, output, places=places):
            return spread(output, places if output.shape[1] > 1 else [])

        module.q_proj.register_forward_hook(lambda _, __, output: spread(output, slice(None)))
        module.k_proj.register_forward_hook(key)
