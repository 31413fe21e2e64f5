"""ConvLLaVA (768, 1024, 1536) as transformers' own `FastVlmForConditionalGeneration` around a ConvNeXt.

FastVLM is what ConvLLaVA is (`fast_vlm.py`). Five stages (stride 64) or four, as the tensors say.

Which tower? The authors' loader ignores the tower inside the checkpoint and takes `mm_vision_tower`, the one after
their second stage. This does the same by default; how far the two differ is measured and recorded.
"""

from typing import Any

import torch
from transformers import FastVlmForConditionalGeneration

from agevlm.conversion.convert_vision import tower_config
from agevlm.conversion.fast_vlm import fast_vlm_config, tower_stride
from agevlm.conversion.layout import LANGUAGE_MODEL, LEFT_OUT, Target, find_origins, read_config, text_config
from agevlm.conversion.prompt import CLIP_MEAN, CLIP_STD, IMAGE_TOKEN, build_processor, load_tokenizer
from agevlm.conversion.sources import PickledWeightsError, Source, Weights, locate


TOWER = "model.vision_tower."
RENAMES = (
    *LANGUAGE_MODEL,
    (r"model\.vision_tower\.vision_tower\.", TOWER),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
)
FIRST = "embeddings.patch_embeddings.weight"


def picture_settings(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """Size, mean and standard deviation of the pictures, as ConvLLaVA's loader settles them.

    Raises:
        ValueError: no size is stated.
    """
    stated = source.configuration("preprocessor_config.json")
    size = config.get("mm_vision_resolution", 0)
    if size <= 256:  # then the loader leaves the tower's own
        crop = stated.get("crop_size", {})
        size = crop.get("height", 0) if isinstance(crop, dict) else crop
    if not size:
        raise ValueError(
            f"Neither `mm_vision_resolution` of config.json nor `crop_size` of {source.name}'s "
            "preprocessor_config.json says how large the pictures are."
        )
    return {
        "image_size": size,
        "image_mean": stated.get("image_mean", CLIP_MEAN),
        "image_std": stated.get("image_std", CLIP_STD),
    }


def largest_difference(target: dict[str, tuple[Weights, str]], inside: dict[str, tuple[Weights, str]]) -> float | None:
    """The largest absolute difference between two towers, None where their shapes differ."""
    largest = 0.0
    for name, (weights, source) in target.items():
        other, other_source = inside[name]
        if weights.shapes[source] != other.shapes[other_source]:
            return None
        largest = max(largest, (weights[source].float() - other[other_source].float()).abs().max().item())
    return largest


def prepare(
    source: Source, vision_tower: str | None = None, from_checkpoint: bool = False, bins: bool = False
) -> Target:
    """Everything but the writing.

    Args:
        vision_tower: folder or repository of the tower, instead of what the configuration names.
        from_checkpoint: take the tower inside the checkpoint.

    Raises:
        ValueError: a checkpoint of another kind, or a tower that cannot be had.
    """
    config = read_config(source, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-1)
    tokenizer = load_tokenizer(source)
    tower_name = vision_tower or config.get("mm_vision_tower")
    tower_source = source
    if not from_checkpoint:
        if not tower_name:
            raise ValueError(
                f"{source.name}: config.json names no `mm_vision_tower`. Give `--vision-tower`, or take the one "
                "inside with `--vision-from-checkpoint`."
            )
        try:
            tower_source = locate(tower_name, bins=bins)
        except ValueError as error:
            pickled = " Pass `--read-bin` to have it read as tensors alone." * isinstance(error, PickledWeightsError)
            raise ValueError(
                f"The vision tower that the authors' loader takes: {error}{pickled} Give another with "
                "`--vision-tower`, or take the one inside the checkpoint with `--vision-from-checkpoint`."
            ) from error
    pictures = picture_settings(tower_source, config)
    weights = Weights(source)
    origins = find_origins(weights, RENAMES)
    inside = {name: origin for name, origin in origins.items() if name.startswith(TOWER)}
    notes: dict[str, Any] = {"vision_tower": {"source": tower_source.name, "revision": tower_source.revision}}
    if from_checkpoint:
        tower_origins = inside
    else:
        tower_weights = Weights(tower_source)
        tower_origins = {TOWER + name: (tower_weights, name) for name in tower_weights}
        if inside:
            common = {name: origin for name, origin in tower_origins.items() if name in inside}
            notes["vision_tower"]["largest_difference_from_checkpoint"] = largest_difference(common, inside)
    origins = {name: origin for name, origin in origins.items() if name not in inside} | tower_origins
    shapes = {name.removeprefix(TOWER): weights_of.shapes[at] for name, (weights_of, at) in tower_origins.items()}
    if FIRST not in shapes:
        raise ValueError(f"{tower_source.name} holds no `{FIRST}`: it is no ConvNeXt in transformers' names.")
    # The checkpoint's own `hidden_act` is the language model's.
    activation = "gelu" if from_checkpoint else tower_source.configuration().get("hidden_act", "gelu")
    tower = tower_config(shapes, activation)
    text = text_config(config, len(tokenizer))
    model_config = fast_vlm_config(tower, text, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), pictures["image_size"])
    # The pooled vector's norm, which the authors' loader deletes before it saves the tower. Nothing reads it.
    width = tower.hidden_sizes[-1]
    made = {f"{TOWER}layernorm.weight": torch.ones(width), f"{TOWER}layernorm.bias": torch.zeros(width)}
    return Target(
        FastVlmForConditionalGeneration, model_config,
        build_processor(tokenizer, cell_size=tower_stride(tower), **pictures), config["vocab_size"], origins,
        made={name: tensor for name, tensor in made.items() if name not in origins},
        left_out=weights.matching(LEFT_OUT), notes=notes,
    )  # fmt: skip
