"""`agevlm train STAGE [flags]`: run one training stage from the command line.

    agevlm train stage3_ground --data scenes --init_from runs/agevlm/stage2_adapt_vision --size tiny
    accelerate launch -m agevlm.training.train stage1_align --data DATA --init_from REPO

The stage's recipe sets the defaults of all training flags (TRL's parser, so `--config FILE.yaml` works too); whatever
is given on the command line wins. `--push_to_hub --hub_model_id ORG/NAME` pushes the finished stage to the Hub,
private unless `--hub_private_repo false`, with its card and a tag (`publish.py`).
"""

import argparse
import gc
import inspect
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch
from trl import TrlParser

from agevlm.training.adapters import AdapterArguments
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.run_stage import StageResult, run_stage
from agevlm.training.stages import STAGES
from agevlm.training.stages.recipe import StageRecipe


DATA_HELP = "Folder of `agevlm data scenes` or `data cambrian`, LLaVA-style JSON, Parquet files, or a Hub data set."


@dataclass
class StageArguments:
    """Flags of `agevlm train` beside those of the trainer."""

    variant: Literal["agevlm", "agevlm-lm", "ca-baseline", "twin", "twin-plain"] = field(
        default="agevlm",
        metadata={
            "help": "Guidance in stage 3, in stages 3 and 4, or nowhere; or the concatenating twin, with or without a "
            "Llama layer for each cross block."
        },
    )
    size: Literal["paper", "small", "tiny"] = field(
        default="paper",
        metadata={"help": "Learning rate, batch, steps and precision for the paper's or smaller models."},
    )
    data: str | None = field(default=None, metadata={"help": DATA_HELP})
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
    dry_run: bool = field(
        default=False, metadata={"help": "Print configuration, trainable parameters, counts and steps, and stop."}
    )
    resume: bool = field(
        default=True, metadata={"help": "Go on from the newest checkpoint of an unfinished run, if there is one."}
    )


def build_stage(stage: str, arguments: StageArguments) -> StageRecipe:
    """The recipe that the flags ask for.

    Raises:
        ValueError: an unknown stage, or a switch that the stage does not have.
    """
    if stage not in STAGES:
        raise ValueError(f"Unknown stage '{stage}'. Choose from {', '.join(STAGES)}.")
    recipe = STAGES[stage]
    switches = {"vision": arguments.vision, "freeze_self_attention": arguments.freeze_self_attention or None}
    switches = {name: value for name, value in switches.items() if value is not None}
    unknown = [name for name in switches if name not in inspect.signature(recipe).parameters]
    if unknown:
        raise ValueError(f"`--{unknown[0]}` does not exist for {stage}. Leave it out.")
    built = recipe(size=arguments.size, variant=arguments.variant, **switches)
    return built if arguments.mask_fraction is None else built.override(mask_fraction=arguments.mask_fraction)


def parse(argv: list[str]) -> tuple[StageRecipe, StageArguments, AgeVlmSFTConfig, AdapterArguments]:
    """Recipe, stage flags, training arguments and adapter flags of a command line that begins with a stage's name.

    Raises:
        ValueError: see `build_stage`.
    """
    if argv and argv[0] not in ("-h", "--help"):
        stage, flags = argv[0], argv[1:]
    else:
        stage, flags = next(iter(STAGES)), argv  # only to print the help; a missing stage ends in it as well
    # First pass: the flags that decide the recipe, which in turn decides the defaults of all the others.
    first = TrlParser(StageArguments, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]  # no NewType fits
    first.add_argument("--per_device_train_batch_size", type=int)
    arguments, namespace, *_ = first.parse_args_and_config(flags, return_remaining_strings=True)
    recipe = build_stage(stage, arguments)
    defaults = {"output_dir": f"runs/{arguments.variant}/{stage}"}
    if namespace.per_device_train_batch_size is not None:
        defaults["per_device_train_batch_size"] = namespace.per_device_train_batch_size
    parser = TrlParser(
        (StageArguments, AgeVlmSFTConfig, AdapterArguments),  # type: ignore[arg-type]  # as above
        prog="agevlm train",
        usage="agevlm train STAGE [--flag VALUE ...]",  # argparse's own names 200 flags before it says a word
        description=f"{__doc__}\nSTAGE is one of {', '.join(STAGES)}. Its own flags come first.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults_with_config(**recipe.training_arguments(**defaults))
    arguments, training, adapters = parser.parse_args_and_config(flags or (["--help"] if not argv else []))
    return recipe, arguments, training, adapters


def end_processes() -> None:
    """Leave the process group, if there is one: the threads of gloo and NCCL outlive a script that does not, and have
    aborted finished runs on their way out."""
    if torch.distributed.is_initialized():
        gc.collect()  # trainers hold the group in reference cycles
        torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> StageResult:
    """Parse `argv` (default: the command line) and run the stage it names."""
    recipe, arguments, training, adapters = parse(list(sys.argv[1:] if argv is None else argv))
    result = run_stage(
        recipe,
        str(training.output_dir),
        data=arguments.data,
        init_from=arguments.init_from,
        revision=arguments.revision,
        args=training,
        adapters=adapters,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
    )
    end_processes()
    return result


if __name__ == "__main__":
    main()
