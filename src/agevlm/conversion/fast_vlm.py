"""FastVLM's configuration around a ConvNeXt: what ConvLLaVA is, and the concatenating twin of our own models.

FastVLM takes the tower's last map, row by row, through two linear layers into the prompt; any tower that transformers
knows. A ConvNeXt's configuration needs the field `hidden_size` beside its own.
"""

from transformers import ConvNextConfig, FastVlmConfig, LlamaConfig


def tower_stride(tower: ConvNextConfig) -> int:
    """Pixels along the side of one visual token."""
    return tower.patch_size * 2 ** (tower.num_stages - 1)


def fast_vlm_config(tower: ConvNextConfig, text: LlamaConfig, image_token_id: int, image_size: int) -> FastVlmConfig:
    """The configuration for square pictures of `image_size` pixels.

    Raises:
        ValueError: pictures that the tower's stride does not divide.
    """
    stride = tower_stride(tower)
    if image_size % stride:
        raise ValueError(f"Pictures of {image_size} pixels are no multiple of the tower's stride of {stride}.")
    return FastVlmConfig(
        vision_config={**tower.to_dict(), "hidden_size": tower.hidden_sizes[-1], "image_size": image_size},
        text_config=text.to_dict(),
        image_token_index=image_token_id,
        image_seq_length=(image_size // stride) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
