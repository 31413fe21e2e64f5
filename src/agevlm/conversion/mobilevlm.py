"""MobileVLM V2 (1.7B, 3B, 7B) as `MobileVlmForConditionalGeneration`.

The tower is the checkpoint's own: OpenAI's CLIP ViT-L/14-336, frozen in training and saved with the rest. Its
configuration is not in the checkpoint, so it stands here.
"""

from pathlib import PurePosixPath

from transformers import CLIPVisionConfig

from agevlm.conversion.layout import LANGUAGE_MODEL, LEFT_OUT, Target, find_origins, read_config, text_config
from agevlm.conversion.modeling_mobilevlm import MobileVlmConfig, MobileVlmForConditionalGeneration
from agevlm.conversion.prompt import IMAGE_TOKEN, build_processor, load_tokenizer
from agevlm.conversion.sources import Source, Weights


TOWER = "clip-vit-large-patch14-336"
HEAD_WIDTH = 64  # of CLIP's ViT-B and ViT-L
GRID = 12  # cells of LDPv2 along a side
RENAMES = (
    *LANGUAGE_MODEL,
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.mm_projector\.mlp\.mlp\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.mlp\.mlp\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.mm_projector\.peg\.peg\.0\.", "model.multi_modal_projector.peg."),
)


def tower_config(shapes: dict[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """CLIP's ViT, its sizes read off its tensors; what has no tensor is ViT-L/14-336's.

    Raises:
        ValueError: the tower is not in the checkpoint.
    """
    prefix = "model.vision_tower.vision_tower.vision_model."
    inside = [name.removeprefix(prefix) for name in shapes if name.startswith(f"{prefix}encoder.layers.")]
    layers = {name.split(".")[2] for name in inside}
    try:
        width, _, _, patch = shapes[f"{prefix}embeddings.patch_embedding.weight"]
        positions = shapes[f"{prefix}embeddings.position_embedding.weight"][0]
        mlp = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise ValueError(
            f"The checkpoint lacks {error.args[0]}: only MobileVLM V2 is converted, which has its tower inside."
        ) from error
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=len(layers), patch_size=patch,
        num_attention_heads=width // HEAD_WIDTH, image_size=round((positions - 1) ** 0.5) * patch,
        hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=768,
    )  # fmt: skip


def prepare(source: Source) -> Target:
    """Everything but the writing.

    Raises:
        ValueError: a checkpoint of another kind.
    """
    config = read_config(
        source, mm_projector_type="ldpnetv2", mm_vision_select_layer=-2, mm_vision_select_feature="patch"
    )
    tower = str(config.get("mm_vision_tower", ""))
    if PurePosixPath(tower).name != TOWER:
        raise ValueError(f"{source.name}: `mm_vision_tower` of config.json is {tower!r}; converted is {TOWER}.")
    tokenizer = load_tokenizer(source)
    weights = Weights(source)
    vision = tower_config(weights.shapes)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model_config = MobileVlmConfig(
        vision_config=vision, text_config=text_config(config, len(tokenizer)), image_token_index=image_token,
        image_seq_length=GRID**2, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return Target(
        MobileVlmForConditionalGeneration, model_config,
        build_processor(tokenizer, vision.image_size, vision.image_size // GRID),
        config["vocab_size"], find_origins(weights, RENAMES), left_out=weights.matching(LEFT_OUT),
        notes={"vision_tower": {"source": source.name, "revision": source.revision}},
    )  # fmt: skip
