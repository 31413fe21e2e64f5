"""Stages of the concatenating twin (section 4's concatenating side): `agevlm train STAGE --variant twin`.

`--init_from` is an AGE-VLM or the twin's stage before. An AGE-VLM is taken apart first: its ConvNeXt, projector and
Llama, and a Llama layer for each cross block, so that both have the same number of parameters
(`agevlm.conversion.twin`). `--variant twin-plain` leaves these layers out. Recipe, rows, order and seed are those of
`--variant ca-baseline`. The twin has no attention maps to guide, no adapters, no card of ours and no push.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from agevlm.conversion.twin import ConcatenatingCollator, concatenating_twin
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.models import load, model_type
from agevlm.training.adapters import AdapterArguments
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.stage_trainer import StageTrainer
from agevlm.training.stages.recipe import TWIN_PLAIN, StageRecipe


class TwinTrainer(StageTrainer):
    """TRL's `SFTTrainer` on our rows, with the twin's collator; takes what `StageTrainer` takes."""

    def __init__(self, model: PreTrainedModel, args: AgeVlmSFTConfig, processing_class: Any, **kwargs):
        collator = ConcatenatingCollator(processing_class, args.max_length, args.pad_to_multiple_of)
        super().__init__(model=model, args=args, processing_class=processing_class, data_collator=collator, **kwargs)


def check_twin(recipe: StageRecipe, args: AgeVlmSFTConfig, adapters: AdapterArguments, dry_run: bool) -> None:
    """Refuse settings that the twin has no use for.

    Raises:
        ValueError: the message names the setting and its value.
    """
    settings = {
        "guidance_weight": args.guidance_weight,
        "mask_fraction": recipe.mask_fraction,
        "probe_steps": args.probe_steps,
        "use_peft": adapters.use_peft,
        "push_to_hub": args.push_to_hub,
        "dry_run": dry_run,
    }
    for name, value in settings.items():
        if value:
            raise ValueError(
                f"The concatenating twin has no `{name}`, got {value}: no maps to guide, no adapters, "
                "no pushes, no dry runs. Leave it out."
            )


def load_twin(
    init_from: str | Path, revision: str, recipe: StageRecipe, console: Console
) -> tuple[PreTrainedModel, Any]:
    """The twin that a stage starts from, float32, and its processor.

    Raises:
        ValueError: see `agevlm.models.load`; `twin-plain` from a twin.
    """
    kind = model_type(init_from, revision)
    model, processor = load(
        init_from, ours=kind == AgeVlmConfig.model_type, revision=revision, dtype=torch.float32, device_map=None
    )
    if kind == AgeVlmConfig.model_type:
        twin, twin_processor = concatenating_twin(model, processor, equal_size=recipe.variant != TWIN_PLAIN)
        console.print(f"AGE-VLM: {model.num_parameters():,} parameters; its twin: {twin.num_parameters():,}")
        return twin, twin_processor
    if recipe.variant == TWIN_PLAIN:
        raise ValueError(
            f"`--variant {TWIN_PLAIN}` says how an AGE-VLM is taken apart; {init_from} is a {kind!r} already. Use "
            "`--variant twin`."
        )
    return model, processor
