"""Export through transformers' own exporters (torch.export, ONNX), and generation on what they made.

Cross-attention makes the cut simple: all that the decoder ever reads of a picture are the keys and values that the
cross blocks cache. So an export has two graphs, and the language model's weights are stored once:

- `vision`: pictures -> those keys and values (tower, projector, the cross blocks' key and value projections).
- `decoder`: tokens and a cache -> logits of the last token and the longer cache. With no text in the cache it is the
  prefill, with one new token a decode step, with several a continuation.

[`ExportedAgeVlm`] runs them behind `generate`. Never shipped with a checkpoint.

Shapes: B batch, T text tokens of a call, P tokens in the cache, N images per row, L visual tokens per image,
V = N * L, G key/value heads, K cross blocks.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.exporters import (
    DynamoExporter,
    ExportedComponent,
    ExportedModel,
    OnnxExporter,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
)

from agevlm.modeling_agevlm.cross_attention_agevlm import cross_cache_layer
from agevlm.modeling_agevlm.modeling_agevlm import (
    AgeVlmCausalLMOutputWithPast,
    AgeVlmForConditionalGeneration,
    AgeVlmPreTrainedModel,
)


AUTO = torch.export.Dim.AUTO
# Sizes of the traced call. None may be 0, 1 or equal to another: torch.export would make such a size a constant.
_BATCH, _TOKENS, _CACHED, _SEEN = 2, 3, 5, 7


def _without(module: Any, *children: str) -> Any:
    """`module` on the same weights without some of its children: a graph stores all weights of what is traced."""
    lean = copy.copy(module)
    lean._modules = {name: child for name, child in module._modules.items() if name not in children}
    return lean


class AgeVlmVisionStage(nn.Module):
    """The `vision` graph."""

    def __init__(self, model: AgeVlmForConditionalGeneration):
        super().__init__()
        self.model = _without(model.model, "language_model")
        blocks = model.model.language_model.cross_attention_layers
        self.cross_attn = nn.ModuleList(_without(block.cross_attn, "q_proj", "q_norm", "o_proj") for block in blocks)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """`pixel_values (B, N, 3, height, width)` -> `keys` and `values`, K tensors `(B, G, V, head width)` each."""
        features = self.model.get_image_features(pixel_values.flatten(0, 1), return_dict=True).pooler_output
        image_states = features.unflatten(0, pixel_values.shape[:2]).flatten(1, 2)
        blocks: Iterable[Any] = self.cross_attn
        projected = [block.project_images(image_states) for block in blocks]
        return {"keys": [key for key, _ in projected], "values": [value for _, value in projected]}


def _decoder_stage(model: AgeVlmForConditionalGeneration, untie: bool) -> AgeVlmForConditionalGeneration:
    """The `decoder` graph: the model without its tower. Its `forward` runs as it is, the pictures being cached.

    Args:
        untie: give the head weights of its own. ONNX Runtime's quantization turns a head's matrix around in place,
            under the hands of the embedding that shares it.
    """
    decoder = _without(model)
    decoder._modules["model"] = _without(model.model, "vision_tower", "multi_modal_projector")
    if untie:
        decoder._modules["lm_head"] = copy.deepcopy(model.lm_head)
    return decoder


def _filled_cache(config, batch: int, cached: int, keys: list[torch.Tensor], values: list[torch.Tensor]):
    """A cache of `cached` text tokens (zeros) and of the pictures' keys and values."""
    text_config = config.text_config
    cache = DynamicCache(config=text_config)
    shape = (batch, text_config.num_key_value_heads, cached, text_config.head_dim)
    for layer in range(text_config.num_hidden_layers):
        cache.update(keys[0].new_zeros(shape), keys[0].new_zeros(shape), layer)
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        cross_cache_layer(cache, text_config.num_hidden_layers, index).update(key, value)
    return cache


def export(
    model: AgeVlmForConditionalGeneration,
    image_size: int | tuple[int, int],
    images: int = 1,
    export_format: Literal["onnx", "dynamo"] = "onnx",
    int8: bool = False,
) -> ExportedModel:
    """Trace both graphs.

    Args:
        model: in float32 for ONNX Runtime on a CPU, whose kernels know no bfloat16.
        image_size: (height, width) of the pictures in pixels, as the processor makes them, or the side of square ones.
        images: places for pictures per row, the same for every row; batch and lengths stay free.
        int8: ONNX only: int8 weights, and activations quantized at run time (ONNX Runtime's dynamic quantization) for
            every matrix product. The tower's depthwise convolutions stay in float32.

    Returns:
        The export with components `vision` and `decoder`; `save_pretrained` writes it.

    Raises:
        ValueError: int8 of another format.
        ImportError: onnx, onnxscript or onnxruntime is missing (`pip install agevlm[export]`).
    """
    if int8 and export_format != "onnx":
        raise ValueError(f"int8 comes from ONNX Runtime: export to 'onnx', not '{export_format}'.")
    model = model.eval()
    config, text_config = model.config, model.config.text_config
    exporter: DynamoExporter
    settings: dict[str, Any] = {}
    if export_format == "onnx":
        exporter = OnnxExporter()
        if int8:
            quantization = OnnxRuntimeDynamicConfig(
                op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True
            )
            settings["quantizer"] = OnnxRuntimeQuantizer(quantization)
    else:
        exporter = DynamoExporter()

    def trace(stage: nn.Module, inputs: dict[str, Any], dynamic_shapes: dict[str, Any]) -> ExportedComponent:
        settings_of_stage = exporter.config_class(dynamic_shapes=dynamic_shapes, **settings)
        return exporter.export(stage, inputs, settings_of_stage).components["model"]

    vision_stage = AgeVlmVisionStage(model)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = torch.zeros(_BATCH, images, 3, height, width, dtype=model.dtype)
    with torch.no_grad():
        projected = vision_stage(pixels)
    vision = trace(vision_stage, {"pixel_values": pixels}, {"pixel_values": {0: AUTO}})

    cells = projected["keys"][0].shape[2] // images
    inputs = {
        "input_ids": torch.zeros(_BATCH, _TOKENS, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _CACHED + _TOKENS, dtype=torch.long),
        "cache": _filled_cache(config, _BATCH, _CACHED, projected["keys"], projected["values"]),
        "image_mask": torch.ones(_BATCH, images, dtype=torch.bool),
        "visual_token_mask": torch.ones(_BATCH, images, cells, dtype=torch.bool),
        "cross_attention_mask": torch.ones(_BATCH, _SEEN, images, dtype=torch.bool),
        "logits_to_keep": 1,
    }
    dynamic_shapes = {
        "input_ids": {0: AUTO, 1: AUTO},
        "attention_mask": {0: AUTO, 1: AUTO},
        # keys and values of every layer; the pictures' have a fixed length
        "cache": [{0: AUTO, 2: AUTO}] * (2 * text_config.num_hidden_layers)
        + [{0: AUTO}] * (2 * len(projected["keys"])),
        "image_mask": {0: AUTO},
        "visual_token_mask": {0: AUTO},
        "cross_attention_mask": {0: AUTO, 1: AUTO},
        "logits_to_keep": None,
    }
    decoder = trace(_decoder_stage(model, untie=int8), inputs, dynamic_shapes)
    return ExportedModel(
        {"vision": vision, "decoder": decoder},
        exporter.export_format,
        config=config,
        generation_config=model.generation_config,
    )


class ExportedAgeVlm(AgeVlmPreTrainedModel, GenerationMixin):
    """An export behind `generate`: greedy, sampled or with beams, in batches, streamed, as with the model itself.

    Not with drafts, which need the logits of several tokens, nor over a cache from before.

    Args:
        exported: what [`export`] returned, or `ExportedModel.from_pretrained` read back.

    Raises:
        ValueError: an export of something else.
    """

    def __init__(self, exported: ExportedModel):
        missing = {"vision", "decoder"} - set(exported.components)
        if missing or exported.config is None:
            raise ValueError(
                f"The export has the graphs {list(exported.components)}; `vision` and `decoder` are needed."
            )
        super().__init__(exported.config)
        self.exported = exported
        self.generation_config = exported.generation_config
        self.image_shape = tuple(exported.components["vision"].metadata.kwargs["pixel_values"]["shape"][1:])
        self.num_cells = exported.components["decoder"].metadata.kwargs["visual_token_mask"]["shape"][2]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs) -> "ExportedAgeVlm":  # type: ignore[override]
        """Load an export's folder or Hub repository; keywords go to `ExportedModel.from_pretrained`.

        torch.export's programs are pickled: transformers wants `trust_remote_code=True` for them.
        """
        return cls(ExportedModel.from_pretrained(folder, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.exported.device

    @property
    def dtype(self) -> torch.dtype:
        return self.exported.dtype

    def generate(self, inputs: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """As the model's own. Rows have as many places for pictures as the export; `image_mask` says which are used.

        Raises:
            ValueError: pictures of another size or number than the export takes, or a cache.
        """
        if kwargs.get("cache", kwargs.get("past_key_values")) is not None:
            raise ValueError("An export makes its own cache: leave `cache` out and give the whole conversation.")
        input_ids = kwargs["input_ids"] if inputs is None else inputs
        rows, images = input_ids.shape[0], self.image_shape[0]
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            # The cross blocks of a graph always run: on hidden pictures they change nothing.
            kwargs["pixel_values"] = torch.zeros(rows, *self.image_shape)
            kwargs["image_mask"] = torch.zeros(rows, images, dtype=torch.bool)
        elif tuple(pixel_values.shape) != (rows, *self.image_shape):
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; this export takes "
                f"{(rows, *self.image_shape)}. Pad rows with fewer pictures and say so in `image_mask`, or export "
                "again for this size and number."
            )
        if kwargs.get("image_mask") is None:
            kwargs["image_mask"] = torch.ones(rows, images, dtype=torch.bool)
        if kwargs.get("visual_token_mask") is None:
            kwargs["visual_token_mask"] = torch.ones(rows, images, self.num_cells, dtype=torch.bool)
        if kwargs.get("cross_attention_mask") is None:
            seen = (input_ids == self.config.image_token_id).cumsum(1)
            kwargs["cross_attention_mask"] = seen[..., None] > torch.arange(images)
        return super().generate(inputs, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        image_mask: torch.Tensor,
        visual_token_mask: torch.Tensor,
        cross_attention_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        pixel_values: torch.Tensor | None = None,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> AgeVlmCausalLMOutputWithPast:
        """One call of the decoder, after one of the tower where `pixel_values (B, N, 3, height, width)` are given.

        Arguments as the model's. Returns `logits (B, 1, vocabulary)` and the cache.

        Raises:
            ValueError: logits of more than the last token are wanted, or neither pictures nor a cache are there.
        """
        if logits_to_keep != 1:
            raise ValueError(
                f"An export gives the logits of the last token, not of {logits_to_keep} (0: all): generate without "
                "drafts (`assistant_model`, `prompt_lookup_num_tokens`)."
            )
        if pixel_values is not None:
            projected = self.exported.runners["vision"](pixel_values=pixel_values.to(self.dtype))
            cache = _filled_cache(self.config, input_ids.shape[0], 0, projected["keys"], projected["values"])
        if cache is None:
            raise ValueError("The first call needs `pixel_values`; `generate` gives hidden ones to rows without.")
        if attention_mask is None:  # `generate` leaves it out where it hides nothing
            length = cache.get_seq_length() + input_ids.shape[1]
            attention_mask = torch.ones(input_ids.shape[0], length, dtype=torch.long)
        outputs = self.exported.runners["decoder"](
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=cache,
            image_mask=image_mask,
            visual_token_mask=visual_token_mask,
            cross_attention_mask=cross_attention_mask,
        )
        return AgeVlmCausalLMOutputWithPast(logits=outputs.logits, cache=outputs.cache)
