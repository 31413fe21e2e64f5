"""The training stages (paper Table 1), one file each, and `STAGES`, which is all that the rest of the package knows.

A file has a `NAME` and `recipe(size, variant, ...)`; arguments after these two are flags of `agevlm train`.
"""

from collections.abc import Callable

from . import stage1_align, stage2_adapt_vision, stage3_ground, stage4_instruct
from .recipe import StageRecipe


# Name -> recipe, in the order of training
STAGES: dict[str, Callable[..., StageRecipe]] = {
    stage.NAME: stage.recipe for stage in (stage1_align, stage2_adapt_vision, stage3_ground, stage4_instruct)
}
