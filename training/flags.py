"""The flags of `agevlm train` that are ours, and its help. Imports nothing heavy, so that the help is printed at once.

The parser that reads a command line is TRL's (`train.py`); it adds the flags of transformers, TRL and peft.
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from agevlm.arguments import VerbParser, note_old

from .stages.recipe import Size, Variant


DATA_HELP = "Folder of `agevlm data scenes` or `data cambrian`, LLaVA-style JSON, Parquet files, or a Hub data set."


@dataclass
class StageArguments:
    """Which stage runs, on what, from where."""

    variant: Variant = field(
        default="agevlm",
        metadata={
            "help": "Guidance in stage 3, in stages 3 and 4 (both also phrase by phrase), or nowhere; or the "
            "concatenating twin, with or without a Llama layer for each cross block."
        },
    )
    size: Size = field(
        default="paper",
        metadata={"help": "Learning rate, batch, steps and precision for the paper's or smaller models."},
    )
    data: str | None = field(default=None, metadata={"help": DATA_HELP})
    masks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sets of masks to join by id: folders of `agevlm ground`, Parquet files, Hub data sets. Default: "
            "those in DATA/masks, by phrase in DATA/phrases."
        },
    )
    init_from: str | None = field(default=None, metadata={"help": "Repository or folder of the model to start from."})
    revision: str | None = field(default=None, metadata={"help": "Revision of that repository."})
    mask_fraction: float | None = field(
        default=None, metadata={"help": "Share of rows that bring their mask. Default: the recipe's."}
    )
    vision: Literal["vision_last_stage", "vision_last_block", "vision_all"] | None = field(
        default=None,
        metadata={"help": "Stages 2 and 3: which end of the vision tower trains. Default: the last stage."},
    )
    freeze_self_attention: bool = field(
        default=False, metadata={"help": "Stage 4: keep the language model's self-attention frozen."}
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Measure the perplexity of this text before and after the stage: a file, a Hub set (ID or "
            "ID:CONFIG), or a folder of scenes. Default: no measurement."
        },
    )
    stored_features: str | None = field(
        default=None,
        metadata={
            "help": "Where the vision tower stays frozen: compute its output for each picture once, store it in this "
            "folder, and read it from there. Same weights, less work. Runs may share the folder. At the paper's size "
            "a picture takes 1.8 MB in bf16, 2.5 million take 4.4 TB."
        },
    )
    answers: str | None = field(
        default=None,
        metadata={
            "help": "Answer these yes/no questions every `answer_steps` steps, for a learning curve in the log: a "
            "folder of scenes, or a Parquet file or Hub set with columns image, question, answer. Default: no curve."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print configuration, trainable parameters, counts and steps, and stop."}
    )
    resume: bool = field(
        default=True,
        metadata={"help": "Go on from the newest checkpoint of an unfinished run; --no-resume starts it again."},
    )


@dataclass
class OwnTrainingArguments:
    """The training arguments that TRL does not have; `AgeVlmSFTConfig` checks them."""

    guidance_weight: float = field(
        default=1.0, metadata={"help": "Weight of the guidance loss (paper: 1). 0 is exactly stock SFT."}
    )
    guidance_loss: Literal["dice", "bce", "kl"] = field(
        default="dice",
        metadata={
            "help": "How attention is compared with the mask: `dice` (the paper's), binary cross-entropy, or the "
            "divergence from an even spread over the mask."
        },
    )
    guidance_normalization: Literal["sum", "max"] = field(
        default="sum",
        metadata={"help": "How attention becomes a distribution: `sum` (cells sum to 1) or `max` (true soft dice)."},
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
        default=False,
        metadata={"help": "Spread the rows with a mask evenly over the steps. The paper draws them at random."},
    )
    loss_spike: float | None = field(
        default=None,
        metadata={
            "help": "Stop before a step whose loss is this many times the median of the last 100, as always before "
            "one that is not finite."
        },
    )
    probe_steps: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, draw where the model looks on the first 4 rows with a mask. 0: never."
        },
    )
    answer_steps: int = field(
        default=100, metadata={"help": "Steps between two points of the learning curve (`answers`)."}
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "Stop at a row that cannot be used (a broken picture, or one behind `max_length`). By default it "
            "is left out, written into `skipped_rows.jsonl` and counted."
        },
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak TFLOP/s of one device, for the metric `mfu`. Default: measured."}
    )


# Flags that had another name -> today's; the old ones work for one more release, also in `--config` files
RENAMED = {"guidance_normalisation": "guidance_normalization"}


def current_name(flag: str) -> str:
    """A flag of the command line (`--old-name=value`) or a field of a configuration under today's name."""
    name, equals, value = flag.partition("=")
    known = name.lstrip("-").replace("-", "_")
    if known not in RENAMED:
        return flag
    note_old(f"`{known}`", f"`{RENAMED[known]}`")
    return f"{'--' if name.startswith('--') else ''}{RENAMED[known]}{equals}{value}"


# The flags of transformers, TRL and peft that most runs need
FREQUENT = {
    "output_dir": "Folder of the stage. Default: runs/VARIANT/STAGE.",
    "config": "YAML file of flags, such as examples/stage3.yaml; those of the command line win.",
    "learning_rate": "Of all parts that have none of their own.",
    "per_device_train_batch_size": "Rows at once on one device; a step keeps the recipe's number of rows.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, in place of epochs.",
    "max_length": "Tokens of a row; longer ones are cut.",
    "seed": "Of the order of rows and of fresh weights.",
    "bf16": "Compute in bfloat16 (True or False).",
    "activation_checkpointing": "Recompute activations in the backward pass (True or False).",
    "dataloader_num_workers": "Processes that read rows.",
    "logging_steps": "Steps between two log entries.",
    "save_steps": "Steps between two checkpoints.",
    "report_to": "Trackers, such as trackio, tensorboard or wandb.",
    "push_to_hub": "Push the finished stage.",
    "hub_model_id": "Repository to push to.",
    "use_peft": "Stage 4: train adapters (LoRA) on the language model.",
    "lora_r": "Rank of the adapters.",
    "lora_alpha": "Scale of the adapters.",
    "load_in_4bit": "With --use-peft: hold the language model in 4 bits.",
}
SWITCHES = ("push_to_hub", "use_peft", "load_in_4bit")


def help_parser(about: str | None) -> VerbParser:
    """A parser that prints the help of `agevlm train`, the text `about` first; it reads no command line."""
    parser = VerbParser("train", about)
    parser.usage = "agevlm train STAGE [--flag VALUE ...]"
    for title, kind in (("the stage", StageArguments), ("guidance, learning rates, stops", OwnTrainingArguments)):
        group = parser.add_argument_group(title)
        for item in fields(kind):
            _add(group, item)
    group = parser.add_argument_group("the most used ones of transformers, TRL and peft")
    for name, text in FREQUENT.items():
        value: dict[str, Any] = {"action": "store_true"} if name in SWITCHES else {"metavar": "VALUE"}
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **value)
    parser.add_argument("--help-all", action="store_true", help="show every flag, also those of the libraries")
    return parser


def _add(group: Any, item: Field) -> None:
    """A flag as HfArgumentParser makes it of a field."""
    name, text = item.name.replace("_", "-"), item.metadata["help"]
    if isinstance(item.default, bool):
        group.add_argument(f"--{'no-' * item.default}{name}", action="store_true", help=text)
        return
    literal = next((kind for kind in (item.type, *get_args(item.type)) if get_origin(kind) is Literal), None)
    shown: dict[str, Any] = {"metavar": "VALUE"} if literal is None else {"choices": get_args(literal)}
    group.add_argument(f"--{name}", help=text, **shown)
