"""Stage 2, adaptation of the vision encoder to high resolution (paper section 3.2.3, Table 1).

Goal: fit the end of the ConvNeXt to 768 pixels, together with projector and cross-attention blocks.
Trains: as stage 1, and the last stage of the vision tower. The paper says "final block"; the stage is what ConvLLaVA,
its motivation, unfreezes. `vision="vision_last_block"` or `"vision_all"` choose the other readings.
Data: the captions of stage 1.
Starts from: stage 1.
"""

from .recipe import CAMBRIAN_CAPTIONS, StageRecipe, build_recipe


NAME = "stage2_adapt_vision"


def recipe(size: str = "paper", variant: str = "agevlm", vision: str = "vision_last_stage") -> StageRecipe:
    """The recipe; the variants do not differ in this stage."""
    return build_recipe(
        name=NAME,
        stage=2,
        goal="adapt the end of the vision tower to high resolution",
        size=size,
        variant=variant,
        trains=("projector", "cross_attention", vision),
        data="captions",
        paper_rows=CAMBRIAN_CAPTIONS,
        mask_fraction=0.0,
    )
