"""Stage 1, initial vision-language alignment (paper section 3.2.3, Table 1).

Goal: map visual features into the language model's space through the new cross-attention blocks, with the
language-modeling loss alone.
Trains: projector and cross-attention blocks. Frozen: vision tower and language model.
Data: image-caption pairs (the paper: Cambrian 2.5M).
Starts from: a pretrained language model and a pretrained ConvNeXt, joined by `agevlm init`.
"""

from .recipe import CAMBRIAN_CAPTIONS, StageRecipe, build_recipe


NAME = "stage1_align"


def recipe(size: str = "paper", variant: str = "agevlm") -> StageRecipe:
    """The recipe; the variants do not differ in this stage."""
    return build_recipe(
        name=NAME,
        stage=1,
        goal="align visual features with the language model through the cross-attention blocks",
        size=size,
        variant=variant,
        trains=("projector", "cross_attention"),
        data="captions",
        paper_rows=CAMBRIAN_CAPTIONS,
        mask_fraction=0.0,
    )
