"""Training arguments of AGE-VLM: TRL's, with the guidance loss (paper section 3.2.2) and a learning rate per part.

Deviations from TRL's defaults, each because of what a row of ours is:
- `assistant_only_loss=True`, and it stays so: the answers of all turns are learned, nothing else.
- `remove_unused_columns=False`, and it stays so: the collator reads `id` and `guidance`, which no model takes as
  inputs.
- `activation_checkpointing=True`: TRL's `gradient_checkpointing=True` under the name that is not deprecated.
- `report_to="none"`: a run reports to its own folder; trackers are opt-in.
- `hub_strategy="end"`, and it stays so: what goes to the Hub is complete (`publish.py`).
"""

from dataclasses import dataclass, field

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from agevlm.training.losses import NORMALISATIONS


@dataclass
class AgeVlmSFTConfig(SFTConfig):
    """Arguments of [`AgeVlmSFTTrainer`].

    Args:
        guidance_weight (`float`): weight of the guidance loss beside the language-modelling loss. The paper's is 1.
            With 0 a training step is exactly that of TRL's `SFTTrainer`.
        guidance_normalisation (`"sum"` or `"max"`): how attention becomes the distribution of Eq. 3.
        projector_learning_rate (`float`, *optional*): learning rate of one part; `learning_rate` where not given. So
            are `cross_attention_learning_rate`, `vision_learning_rate` and `language_model_learning_rate`.
        spread_guided_rows (`bool`): spread the rows with a mask evenly over the steps. The paper draws at random.
        loss_spike (`float`, *optional*): stop before a step whose loss is this many times the median of the last 100,
            as always before one that is not finite (`callbacks.py`).
        probe_steps (`int`): every so many steps, draw where the model looks on the first 4 rows with a mask.
        strict (`bool`): stop at a row that cannot be used (a broken picture, or one behind `max_length`) instead of
            leaving it out, writing it into `skipped_rows.jsonl` and counting it (`skipped_rows`).
        peak_tflops (`float`, *optional*): of one device, for `mfu`. Default: measured with a matrix product.

    Raises:
        ValueError: an unknown normalisation, a negative weight or rate, `remove_unused_columns=True`, or another
            `hub_strategy` than "end".
    """

    guidance_weight: float = field(
        default=1.0, metadata={"help": "Weight of the guidance loss (paper: 1). 0 is exactly stock SFT."}
    )
    guidance_normalisation: str = field(
        default="sum",
        metadata={
            "help": "How attention becomes a distribution: `sum` (cells sum to 1) or `max` (true soft dice).",
            "choices": list(NORMALISATIONS),
        },
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Default: `learning_rate`."}
    )
    cross_attention_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the cross-attention blocks. Default: `learning_rate`."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: `learning_rate`."}
    )
    language_model_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the language model. Default: `learning_rate`."}
    )
    spread_guided_rows: bool = field(
        default=False, metadata={"help": "Spread the rows with a mask evenly over the steps instead of at random."}
    )
    loss_spike: float | None = field(
        default=None, metadata={"help": "Stop before a step whose loss is this many times the usual one."}
    )
    probe_steps: int = field(
        default=0, metadata={"help": "Draw where the model looks on fixed rows every so many steps. 0: never."}
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Stop at a row that cannot be used instead of leaving it out and counting it."},
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak TFLOP/s of one device, for the metric `mfu`. Default: measured."}
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Must stay on: the answers of all assistant turns are learned, nothing else."}
    )
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Recompute activations in the backward pass: less memory, some 20%% slower."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads columns that the model does not take."}
    )
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "Must stay `end`: a stage is pushed when it is finished."}
    )
    # HfArgumentParser reads this type only in TrainingArguments' own order.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers to report to, such as `trackio`, `tensorboard` or `wandb`."}
    )

    def __post_init__(self):
        if self.guidance_normalisation not in NORMALISATIONS:
            raise ValueError(
                f"`guidance_normalisation` must be one of {', '.join(NORMALISATIONS)}, got "
                f"'{self.guidance_normalisation}'."
            )
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
    def part_learning_rates(self) -> dict[str, float]:
        """The parts that have a learning rate of their own."""
        rates = {
            "projector": self.projector_learning_rate,
            "cross_attention": self.cross_attention_learning_rate,
            "vision": self.vision_learning_rate,
            "language_model": self.language_model_learning_rate,
        }
        return {part: rate for part, rate in rates.items() if rate is not None}
