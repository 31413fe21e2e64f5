"""The concatenating twin: our parts without the cross blocks, the picture in the prompt (section 3.1's other side).

`concatenating_twin` takes an assembled AGE-VLM apart and gives its ConvNeXt, projector and Llama, weights and all, to
transformers' own FastVLM. A comparison then differs in one thing: whether text attends to the picture in blocks of its
own or in every self-attention layer. What follows from that, and is not made equal: sequences are longer (by 576
tokens).

Without the cross blocks it is smaller, in the paper's size by 243 million parameters. `equal_size` gives it a Llama
layer in the place of every cross block. A cross block holds what a Llama layer holds (grouped attention, two norms, a
gated MLP), so that both have the same number of parameters, but for the pooled vector's norm that a stock ConvNeXt has
and nothing reads. The layers begin as cross blocks do, with both ends of their branches at zero: before training the
larger twin computes what the smaller one computes.

It trains with TRL's own `SFTTrainer` on the same rows, by the recipes of `training/stages` without guidance;
`agevlm train STAGE --variant twin` is that in one command. The parts have the same names, so
`set_trainable(twin, recipe.trains, recipe.frozen)` reads Table 1 for it too: where stages 1 to 3 train projector and
cross blocks, they train projector and added layers, or in the smaller twin the projector alone.

Bars beside a padded picture stay visible to it, as they are to the published models of this kind; ours masks them.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ConvNextConfig, FastVlmForConditionalGeneration, LlamaConfig, LlavaProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from agevlm.conversion.fast_vlm import fast_vlm_config
from agevlm.conversion.prompt import llava_processor
from agevlm.data.rows import IMAGE_PLACEHOLDER, validate_row
from agevlm.images import open_image
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.models import check_messages, control_tokens
from agevlm.processing import AgeVlmProcessor


OURS_ALONE = "cross_attention_layers."
POOLED_NORM = "layernorm."
BRANCH_ENDS = ("self_attn.o_proj.", "mlp.down_proj.")


def concatenating_twin(
    model: AgeVlmForConditionalGeneration, processor: AgeVlmProcessor, equal_size: bool = False
) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """The twin of a model and its processor. Weights are copied; the twin is on the CPU, in the model's dtype.

    Args:
        equal_size: with a Llama layer for each cross block, where that stands in the interleaved stack. The text
            configuration's `added_layers` names them.

    Raises:
        ValueError: a geometry of pictures other than `pad`, which FastVLM's image processors do not have; of equal
            size: cross blocks with gates or query and key norms, which Llama layers do not have.
    """
    image_size = processor.image_processor.size["height"]
    added = list(model.config.cross_attention_layers) if equal_size else []
    if added and (model.config.cross_attention_gate == "tanh" or model.config.cross_attention_qk_norm):
        raise ValueError(
            "A twin of equal size has Llama layers for cross blocks; those with `cross_attention_gate` or "
            "`cross_attention_qk_norm` hold more than these. Leave `equal_size` out."
        )
    text = model.config.text_config.to_dict()
    if added:
        text |= {"num_hidden_layers": text["num_hidden_layers"] + len(added), "added_layers": added}
    config = fast_vlm_config(
        ConvNextConfig(**model.config.vision_config.to_dict()),
        LlamaConfig(**text),
        model.config.image_token_id,
        image_size,
    )
    twin_processor = concatenating_processor(processor)
    twin = FastVlmForConditionalGeneration(config).to(model.dtype)
    parts = twin.model
    # The pooled vector's norm, which ours leaves out, stays as it was made: nothing reads it.
    pooled = {name: value for name, value in parts.vision_tower.state_dict().items() if name.startswith(POOLED_NORM)}
    parts.vision_tower.load_state_dict({**pooled, **model.model.vision_tower.state_dict()})
    parts.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    language = model.model.language_model.state_dict()
    own = {name: value for name, value in language.items() if not name.startswith(OURS_ALONE)}
    if added:
        own = _interleaved(own, added) | _as_llama_layers(language, added)
    parts.language_model.load_state_dict(own)
    twin.lm_head.load_state_dict(model.lm_head.state_dict())
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.train(model.training), twin_processor


def _interleaved(weights: dict[str, torch.Tensor], added: list[int]) -> dict[str, torch.Tensor]:
    """Llama's weights with its layers renumbered, so that the numbers `added` are free."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    places = [place for place in range(depth + len(added)) if place not in added]

    def moved(name: str) -> str:
        if not name.startswith("layers."):
            return name
        _, number, rest = name.split(".", 2)
        return f"layers.{places[int(number)]}.{rest}"

    return {moved(name): value for name, value in weights.items()}


def _as_llama_layers(weights: dict[str, torch.Tensor], added: list[int]) -> dict[str, torch.Tensor]:
    """The cross blocks' weights under a Llama layer's names, the ends of both branches at zero."""
    layers = {}
    for name, value in weights.items():
        if name.startswith(OURS_ALONE):
            number, rest = name.removeprefix(OURS_ALONE).split(".", 1)
            rest = rest.replace("cross_attn.", "self_attn.")
            closed = rest.startswith(BRANCH_ENDS)
            layers[f"layers.{added[int(number)]}.{rest}"] = torch.zeros_like(value) if closed else value
    return layers


def concatenating_processor(processor: AgeVlmProcessor) -> LlavaProcessor:
    """The same tokenizer, chat template and pixels; `<|image|>` stands for as many tokens as the picture has cells.

    Raises:
        ValueError: see `concatenating_twin`.
    """
    images = processor.image_processor
    if images.geometry != "pad":
        raise ValueError(f"The twin pads its pictures; `geometry` of the image processor is '{images.geometry}'.")
    tokenizer = copy.deepcopy(processor.tokenizer)
    # The template writes the first token. A tokenizer that adds it (Llama-3's does) would add a second one.
    tokenizer.backend_tokenizer.post_processor = None
    return llava_processor(
        tokenizer, images.size["height"], images.cell_size, processor.chat_template, IMAGE_PLACEHOLDER,
        resample=images.resample, image_mean=list(images.image_mean), image_std=list(images.image_std),
    )  # fmt: skip


def in_parts(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ours as TRL takes it: pictures open, each placeholder a part of its message."""
    images = [open_image(image, where=f"row {row['id']}") for image in row["images"]]
    messages = []
    for message in row["messages"]:
        parts: list[dict[str, str]] = []
        for index, text in enumerate(message["content"].split(IMAGE_PLACEHOLDER)):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": message["role"], "content": parts})
    return {"images": images, "messages": messages}


@dataclass
class ConcatenatingCollator:
    """Rows to batches of the twin: TRL's collator, loss on the answers alone.

    Args:
        processor: of the twin.
        max_length: texts are cut after this many tokens, a picture counting as one as it does in `AgeVlmDataCollator`;
            None keeps them whole.
        pad_to_multiple_of: rounds the padded length up.

    Raises:
        ValueError: a bad row, named, or a text that is cut inside its picture.
    """

    processor: LlavaProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = control_tokens(self.processor)
        for row in rows:
            validate_row(row)
            check_messages(tokens, row, IMAGE_PLACEHOLDER)
        length = self.max_length
        if length is not None:
            side = self.processor.image_processor.crop_size["height"] // self.processor.patch_size
            length += (side**2 - 1) * max(len(row["images"]) for row in rows)
        collate = DataCollatorForVisionLanguageModeling(
            self.processor, length, pad_to_multiple_of=self.pad_to_multiple_of, assistant_only_loss=True
        )
        return collate([in_parts(row) for row in rows])
