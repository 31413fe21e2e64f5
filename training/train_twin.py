"""One stage of the concatenating twin, with the flags of `agevlm train` (section 4's concatenating side).

    python -m agevlm.training.train_twin stage1_align --init_from start --data scenes --size tiny --output_dir runs/a

`--init_from` is the twin's stage before, or a folder or repository of an AGE-VLM (`agevlm init`). That is taken apart
first: its ConvNeXt, projector and Llama, and a Llama layer for each cross block, so that both have the same number of
parameters (`agevlm.conversion.twin`). `--plain` leaves these layers out. Recipe, rows, order and seed are those of
`agevlm train STAGE --variant ca-baseline`; the folder is `runs/twin/STAGE` unless `--output_dir` says otherwise.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from agevlm.conversion.twin import concatenating_twin
from agevlm.data.published.prepare import prepare
from agevlm.data.scenes.build import load_rows
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.models import load, model_type
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.stages.recipe import StageRecipe
from agevlm.training.train import STAGES, parse
from agevlm.training.twin_stage import run_twin_stage


UNKNOWN = ("--variant", "--dry_run", "--use_peft", "--push_to_hub", "--mask_fraction")


def with_changes(recipe: StageRecipe, training: AgeVlmSFTConfig) -> StageRecipe:
    """The recipe with whatever the command line has set otherwise."""
    usual = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=training.output_dir))
    names = [field.name for field in dataclasses.fields(AgeVlmSFTConfig) if field.init]
    changes = {name: getattr(training, name) for name in names if getattr(training, name) != getattr(usual, name)}
    return recipe.override(**changes)


def save_twin(init_from: str, revision: str, equal_size: bool, folder: Path) -> None:
    """The twin of an AGE-VLM, written to `folder`."""
    model, processor = load(init_from, ours=True, revision=revision, device_map=None)
    twin, twin_processor = concatenating_twin(model, processor, equal_size)
    Console().print(f"AGE-VLM: {model.num_parameters():,} parameters; its twin: {twin.num_parameters():,}")
    twin.save_pretrained(folder)
    twin_processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Train one stage, go on with it, or find it done; see `agevlm.training.twin_stage`.

    Raises:
        ValueError: nothing to start from or to train on, a flag that the twin has no use for, or a folder that belongs
            to another run.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--plain", action="store_true")
    choice, flags = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    if not flags or flags[0] in ("-h", "--help"):
        print(f"{__doc__}\nSTAGE is one of {', '.join(STAGES)}.")
        return
    refused = [flag for flag in flags if flag.split("=")[0] in UNKNOWN]
    if refused:
        raise ValueError(f"The concatenating twin has no `{refused[0]}`: no maps to guide, no adapters, no pushes.")
    if not any(flag.split("=")[0] == "--output_dir" for flag in flags):
        flags += ["--output_dir", f"runs/twin/{flags[0]}"]
    recipe, arguments, training, _ = parse([*flags, "--variant", "ca-baseline"])
    if arguments.init_from is None or arguments.data is None:
        raise ValueError("Give `--init_from`, an AGE-VLM or the twin's stage before, and `--data`, a folder of rows.")
    recipe, output = with_changes(recipe, training), Path(str(training.output_dir))
    rows = load_rows(prepare(arguments.data, recipe.data), recipe.data, mask_fraction=0.0)
    revision = arguments.revision or "main"
    kind = model_type(arguments.init_from, revision)
    if choice.plain and kind != AgeVlmConfig.model_type:
        raise ValueError(f"`--plain` says how an AGE-VLM is taken apart; {arguments.init_from} is a {kind!r} already.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=output.parent) as temporary:
        start = Path(arguments.init_from)
        if kind == AgeVlmConfig.model_type:
            start = Path(temporary) / f"{start.resolve().name}-twin"
            save_twin(arguments.init_from, revision, not choice.plain, start)
        run_twin_stage(recipe, output, rows, start)
    print(f"{recipe.name}: {output}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"agevlm: {error}")
