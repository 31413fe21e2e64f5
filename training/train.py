"""What `agevlm train STAGE [flags]` does: the recipe sets the defaults of all training flags, the command line wins.

The parser is TRL's, so `--config FILE.yaml` works too. `cli.py` has the verb and `flags.py` the flags that are ours.
"""

import gc
import inspect
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import TrlParser

from agevlm.progress import lines, written
from agevlm.store import locked
from agevlm.training import cli
from agevlm.training.adapters import AdapterArguments
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.flags import StageArguments, current_name
from agevlm.training.run_stage import StageResult, run_stage
from agevlm.training.stages import STAGES
from agevlm.training.stages.recipe import StageRecipe


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


class FileParser(TrlParser):
    """TRL's, whose configuration files are read as the command line is: names with dashes, choices checked."""

    def parse_args_and_config(self, args: Sequence[str], **kwargs: Any) -> tuple:  # type: ignore[override]
        """Raises ValueError: the file is no YAML, or a field is unknown or has a value that its flag does not take."""
        try:
            return super().parse_args_and_config(args, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"`--config`: the file is no YAML ({' '.join(str(error).split())})") from error

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        given = {name.replace("-", "_"): value for name, value in kwargs.items()}
        for action in self._actions:
            value = given.get(action.dest)
            if value is not None and action.choices and value not in action.choices:
                allowed = ", ".join(map(str, action.choices))
                raise ValueError(f"`--config`: the field {action.dest} is {value!r}; choose from {allowed}")
        if isinstance(given.get("masks"), str):
            given["masks"] = [given["masks"]]
        return super().set_defaults_with_config(**given)


class StageParser(FileParser):
    """Its configuration files may hold old names of flags."""

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        return super().set_defaults_with_config(**{current_name(name): value for name, value in kwargs.items()})


def parse(argv: list[str]) -> tuple[StageRecipe, StageArguments, AgeVlmSFTConfig, AdapterArguments]:
    """Recipe, stage flags, training arguments and adapter flags of a command line that begins with a stage's name.

    Raises:
        ValueError: see `build_stage`.
    """
    # All flags are shown for the first stage, which has what all of them have.
    stage, flags = (next(iter(STAGES)), argv) if argv[0] == "--help-all" else (argv[0], argv[1:])
    flags = [part for word in flags for part in current_name(word).split("=", word.startswith("--config="))]
    # First pass: the flags that decide the recipe, which in turn decides the defaults of all the others.
    first = FileParser(StageArguments, add_help=False, allow_abbrev=False)  # type: ignore[arg-type]  # no NewType fits
    first.add_argument("--per_device_train_batch_size", type=int)
    arguments, namespace, *_ = first.parse_args_and_config(flags, return_remaining_strings=True)
    recipe = build_stage(stage, arguments)
    defaults = {"output_dir": f"runs/{arguments.variant}/{stage}"}
    if namespace.per_device_train_batch_size is not None:
        defaults["per_device_train_batch_size"] = namespace.per_device_train_batch_size
    parser = StageParser(
        (StageArguments, AgeVlmSFTConfig, AdapterArguments),  # type: ignore[arg-type]  # as above
        prog="agevlm train",
        usage="agevlm train STAGE [--flag VALUE ...]",  # argparse's own names 600 flags before it says a word
        description="Every flag; `agevlm train --help` shows those that most runs need.",
        add_help=False,
    )
    parser.add_argument("--help-all", action="help", help="show every flag")
    TrlParser.set_defaults_with_config(parser, **recipe.training_arguments(**defaults))
    arguments, training, adapters = parser.parse_args_and_config(flags)
    return recipe, arguments, training, adapters


def end_processes() -> None:
    """Leave the process group, if there is one: the threads of gloo and NCCL outlive a script that does not, and have
    aborted finished runs on their way out."""
    if torch.distributed.is_initialized():
        gc.collect()  # trainers hold the group in reference cycles
        torch.distributed.destroy_process_group()


def main(argv: list[str]) -> StageResult:
    """Parse `argv` and run the stage it names."""
    recipe, arguments, training, adapters = parse(argv)
    output_dir = Path(str(training.output_dir))
    writes = training.process_index == 0 and not arguments.dry_run
    with locked(output_dir, wait=False) if writes else nullcontext():
        result = run_stage(
            recipe,
            str(output_dir),
            data=arguments.data,
            masks=arguments.masks or (),
            init_from=arguments.init_from,
            revision=arguments.revision,
            language=arguments.language,
            stored_features=arguments.stored_features,
            answers=arguments.answers,
            args=training,
            adapters=adapters,
            resume=arguments.resume,
            dry_run=arguments.dry_run,
        )
    if result.status == "trained" and training.process_index == 0:
        later = [name for name in STAGES if name > result.lineage["name"]]
        given = ["--data", arguments.data or "DATA", "--size", arguments.size, "--variant", arguments.variant]
        train = f"agevlm train {later[0]} {shlex.join(given)} --init-from {{}} --output-dir RUN" if later else ""
        written(output_dir, train or "agevlm eval {} --output DIR")
    end_processes()
    return result


if __name__ == "__main__":  # what `accelerate launch -m` runs
    with nullcontext() if sys.stderr.isatty() else lines("train"):
        cli.train()
