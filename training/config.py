"""Training arguments of AGE-VLM: TRL's, with the guidance loss (paper section 3.2.2) and a learning rate per part.

Deviations from TRL's defaults, because of the form of our rows:
- `assistant_only_loss=True` always: the answers of all turns are learned, nothing else.
- `remove_unused_columns=False` always: the collator reads `id` and `guidance`, which no model takes as
  inputs.
- `activation_checkpointing=True`: TRL's `gradient_checkpointing=True` under the name that is not deprecated.
- `report_to="none"`: a run reports to its own folder; trackers are opt-in.
- `hub_strategy="end"` always: only complete checkpoints go to the Hub (`publish.py`).
"""

import os
from dataclasses import dataclass, field

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from agevlm.training.flags import OwnTrainingArguments
from agevlm.training.losses import check_loss


@dataclass
class AgeVlmSFTConfig(OwnTrainingArguments, SFTConfig):
    """Arguments of [`AgeVlmSFTTrainer`]: TRL's and those of [`OwnTrainingArguments`].

    Raises:
        ValueError: an unknown guidance loss or normalization, a negative weight or rate, `answer_steps` below 1,
            `remove_unused_columns=True`, or another `hub_strategy` than "end".
    """

    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Must stay on: the answers of all assistant turns are learned, nothing else."}
    )
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Recompute activations in the backward pass: less memory, some 20%% slower."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads columns that the model does not take."}
    )
    use_cache: bool = field(
        default=True,
        metadata={"help": "Written into the model's configuration, for whoever loads it. Training uses no cache."},
    )
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "Must stay `end`: a stage is pushed when it is finished."}
    )
    # HfArgumentParser reads this type only in TrainingArguments' own order.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers to report to, such as `trackio`, `tensorboard` or `wandb`."}
    )

    def __post_init__(self):
        check_loss(self.guidance_loss, self.guidance_normalization)
        if self.answer_steps < 1:
            raise ValueError(f"`answer_steps` must be positive, got {self.answer_steps}.")
        if self.guidance_weight < 0:
            raise ValueError(f"`guidance_weight` must be 0 (off) or positive, got {self.guidance_weight}.")
        for part, rate in self.part_learning_rates.items():
            if rate < 0:
                raise ValueError(f"`{part}_learning_rate` must not be negative, got {rate}.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must stay False: the collator reads the columns `id` and `guidance`, which "
                "would be removed because the model does not take them."
            )
        if not self.assistant_only_loss or self.completion_only_loss:
            raise ValueError(
                "`assistant_only_loss` must stay True and `completion_only_loss` off: the collator makes labels of "
                "the answers of all turns and of nothing else, whatever these say."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "`use_liger_kernel`: Liger knows models by their type and has no kernels for this one; nothing would "
                "change. Its largest saving, the loss without logits, TRL's fused head has already."
            )
        if HubStrategy(self.hub_strategy) != HubStrategy.END:
            raise ValueError(
                f"`hub_strategy` must stay 'end', got '{self.hub_strategy}': a stage is pushed when it is finished, "
                "so that nobody loads half of one."
            )
        super().__post_init__()

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed divide the model, by these arguments or by accelerate's."""
        by_accelerate = (os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
        return bool(self.fsdp or self.deepspeed) or any(by_accelerate)

    @property
    def part_learning_rates(self) -> dict[str, float]:
        """The parts that have a learning rate of their own."""
        parts = ("projector", "cross_attention", "vision", "language_model")
        rates = {part: getattr(self, f"{part}_learning_rate") for part in parts}
        return {part: rate for part, rate in rates.items() if rate is not None}
