"""Stage 3, spatial grounding by distillation from masks (paper sections 3.2.2 and 3.2.3, Table 1).

Goal: make the cross-attention look at what the text speaks about: language-modeling loss on all captions, guidance
loss (Eq. 3) on those with a mask, with equal weights.
Trains: as stage 2.
Data: the captions again, 77K of 2.5M with a mask.
Starts from: stage 2.
Variants: `ca-baseline` runs the same stage on the same data with a guidance weight of 0, so that all variants have
seen the same number of steps.
"""

from .recipe import CAMBRIAN_CAPTIONS, CAPTION_MASKS, StageRecipe, build_recipe


NAME = "stage3_ground"


def recipe(size: str = "paper", variant: str = "agevlm", vision: str = "vision_last_stage") -> StageRecipe:
    """The recipe."""
    return build_recipe(
        name=NAME,
        stage=3,
        goal="ground the cross-attention in masks",
        size=size,
        variant=variant,
        guided_variants=("agevlm", "agevlm-lm"),
        trains=("projector", "cross_attention", vision),
        data="captions",
        paper_rows=CAMBRIAN_CAPTIONS,
        mask_fraction=CAPTION_MASKS / CAMBRIAN_CAPTIONS,
    )
