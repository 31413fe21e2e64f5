"""Stage recipes (paper Table 1, sections 3.2.3 and 4, appendix B).

A recipe is one complete, frozen description of a stage; variants and sizes are the same recipe with named fields
changed. This module imports nothing heavy at its top: the help of `agevlm train` names the stages.

Settings that the paper does not state are decided here once: beta1 0.9 and the cosine schedule are the usual choice of
the models it builds on; the number of masks follows its counts (77K, 150K) rather than its percentages, which
contradict them.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args


Variant = Literal["agevlm", "agevlm-lm", "agevlm-phrases", "agevlm-phrases-lm", "ca-baseline", "twin", "twin-plain"]
Size = Literal["paper", "small", "tiny"]
TWINS = TWIN, TWIN_PLAIN = "twin", "twin-plain"
BY_PHRASE = ("agevlm-phrases", "agevlm-phrases-lm")  # as those without -phrases, with a mask for each phrase

CAMBRIAN_CAPTIONS, CAMBRIAN_INSTRUCTIONS = 2_500_000, 10_000_000
CAPTION_MASKS, INSTRUCTION_MASKS = 77_000, 150_000

PAPER_TRAINING = {
    "learning_rate": 1e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "bf16": True,
    "activation_checkpointing": True,
    "dataloader_num_workers": 8,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "loss_spike": 10.0,
}
# Small data sets have few masks: with the paper's fractions a stage would see a handful.
_SMALLER = {
    "global_batch_size": 32,
    "mask_fraction": 1.0,
    "per_device_train_batch_size": 32,
    "activation_checkpointing": False,
    "dataloader_num_workers": 0,
    "save_steps": 100,
    "loss_spike": None,
}
SMALLER: dict[str, dict[str, Any]] = {
    "small": {
        **_SMALLER,
        "learning_rate": 1e-3,
        "save_total_limit": 1,  # each is 2 GB
        "global_batch_size": 16,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",  # of 32 captions in any order, a third is padding
    },
    "tiny": {**_SMALLER, "learning_rate": 3e-3, "weight_decay": 0.05, "bf16": False},
}


@dataclass(frozen=True)
class StageRecipe:
    """One stage of one variant at one size.

    Args:
        name, stage, goal: `stage1_align`, 1, one sentence.
        variant: `agevlm`, `agevlm-lm`, both also by phrase (`BY_PHRASE`), `ca-baseline`, or the twin of
            `training/twin.py`: `twin`, `twin-plain`.
        size: `paper`, `small` or `tiny`.
        trains, frozen: parts that train, and parts taken out of them again (`training/freezing.py`).
        data: part of the data set, `captions` or `instructions`.
        paper_rows: how many rows the paper trains on, for a dry run without data.
        mask_fraction: share of rows that bring their mask.
        global_batch_size: rows per optimizer step over all devices and accumulated batches.
        training: keyword arguments of `AgeVlmSFTConfig`.
    """

    name: str
    stage: int
    goal: str
    variant: str
    size: str
    trains: tuple[str, ...]
    data: Literal["captions", "instructions"]
    paper_rows: int
    mask_fraction: float
    frozen: tuple[str, ...] = ()
    global_batch_size: int = 128
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def by_phrase(self) -> bool:
        """Whether the stage is guided phrase by phrase."""
        return self.variant in BY_PHRASE and self.training.get("guidance_weight", 0) > 0

    def override(self, **changes: Any) -> "StageRecipe":
        """The recipe with fields changed: its own fields, or arguments of `AgeVlmSFTConfig`."""
        own = {name: changes.pop(name) for name in list(changes) if name in RECIPE_FIELDS}
        from agevlm.training.config import AgeVlmSFTConfig

        unknown = set(changes) - {item.name for item in dataclasses.fields(AgeVlmSFTConfig)}
        if unknown:
            raise ValueError(f"Neither a recipe nor `AgeVlmSFTConfig` has the fields {', '.join(sorted(unknown))}.")
        return dataclasses.replace(self, training={**self.training, **changes}, **own)

    def training_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Keyword arguments of `AgeVlmSFTConfig` on this machine.

        Without an accelerator training runs on the CPU. Gradients are accumulated so that a step has
        `global_batch_size` rows on however many devices, unless `overrides` set the accumulation.

        Raises:
            ValueError: the devices' batches do not divide the global batch.
        """
        import torch

        arguments = {"use_cpu": not torch.accelerator.is_available(), **self.training, **overrides}
        if "gradient_accumulation_steps" not in arguments:
            devices = int(os.environ.get("WORLD_SIZE", "1"))
            at_once = arguments["per_device_train_batch_size"] * devices
            if self.global_batch_size % at_once:
                raise ValueError(
                    f"{devices} device(s) with `per_device_train_batch_size="
                    f"{arguments['per_device_train_batch_size']}` do not divide the recipe's batch of "
                    f"{self.global_batch_size}. Choose a divisor, or set `gradient_accumulation_steps`."
                )
            arguments["gradient_accumulation_steps"] = self.global_batch_size // at_once
        return arguments


RECIPE_FIELDS = {item.name for item in dataclasses.fields(StageRecipe)} - {"training"}


def build_recipe(
    *,
    size: str,
    variant: str,
    guided_variants: Sequence[str] = (),
    smaller: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> StageRecipe:
    """The recipe of a stage script.

    Args:
        guided_variants: variants whose guidance weight is 1 in this stage (Table 1); 0 for the others.
        smaller: `{size: changes}` of this stage alone, on top of what all stages change at that size.
        **fields: the fields of `StageRecipe`.

    Raises:
        ValueError: an unknown size or variant.
    """
    for name, value, known in (("size", size, Size), ("variant", variant, Variant)):
        if value not in get_args(known):
            raise ValueError(f"Unknown {name} '{value}'. Choose from {', '.join(get_args(known))}.")
    guided = variant.replace("-phrases", "") in guided_variants
    training = {**PAPER_TRAINING, "guidance_weight": 1.0 if guided else 0.0}
    recipe = StageRecipe(size=size, variant=variant, training=training, **fields)
    changes = {**SMALLER.get(size, {}), **(smaller or {}).get(size, {})}
    if size != "paper":
        # The tower is trained on the same kind of pictures. Frozen, its output can be stored (`features.py`).
        changes["trains"] = tuple(part for part in recipe.trains if not part.startswith("vision"))
    if variant in TWINS:
        recipe = recipe.override(mask_fraction=0.0)
    if recipe.mask_fraction == 0:
        changes.pop("mask_fraction", None)
    return recipe.override(**changes)
