"""Stage 4, visually grounded instruction tuning (paper section 3.2.3, Table 1).

Goal: answer instructions about pictures; "end-to-end instruction fine-tuning for the entire model".
Trains: everything. `freeze_self_attention=True` reads "the self-attention layers of the LLM are kept intact" literally
instead; Table 1 marks them as trained, which is followed.
Data: instructions (the paper: Cambrian 10M), 150K of them with a mask.
Starts from: stage 3.
Variants: `agevlm` and `ca-baseline` train the language-modeling loss alone, `agevlm-lm` adds the guidance loss.
"""

from .recipe import CAMBRIAN_INSTRUCTIONS, INSTRUCTION_MASKS, StageRecipe, build_recipe


NAME = "stage4_instruct"


def recipe(size: str = "paper", variant: str = "agevlm", freeze_self_attention: bool = False) -> StageRecipe:
    """The recipe."""
    return build_recipe(
        name=NAME,
        stage=4,
        goal="answer instructions about pictures",
        size=size,
        variant=variant,
        guided_variants=("agevlm-lm",),
        trains=("projector", "cross_attention", "vision_all", "language_model"),
        frozen=("self_attention",) if freeze_self_attention else (),
        data="instructions",
        paper_rows=CAMBRIAN_INSTRUCTIONS,
        mask_fraction=INSTRUCTION_MASKS / CAMBRIAN_INSTRUCTIONS,
        # At the other stages' rate the whole model moves so fast that the grounded attention is lost (docs/LOG.md).
        # In sequence: rows on presence alone come first, if there are any.
        smaller={
            "tiny": {"learning_rate": 1e-3, "train_sampling_strategy": "sequential"},
            "small": {
                "learning_rate": 3e-4,
                "language_model_learning_rate": 1e-4,
                "global_batch_size": 8,  # lookup is found after a number of steps rather than of questions
                "per_device_train_batch_size": 8,
                "train_sampling_strategy": "sequential",
            },
        },
    )
