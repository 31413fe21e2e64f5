"""The verbs `train`, `init`, `parts` and `push`. Their implementation is imported after the arguments are parsed."""

import argparse
import inspect
import sys
from pathlib import Path

from agevlm.arguments import VerbParser

from .defaults import IMAGE_SIZE, LANGUAGE_MODEL, VISION_TOWER
from .flags import help_parser
from .stages import STAGES


def train(argv: list[str] | None = None) -> None:
    """Run one training stage; the same command again resumes it.

    agevlm train stage3_ground --data scenes --init-from runs/agevlm/stage2_adapt_vision --size tiny
    agevlm train stage3_ground --config examples/stage3.yaml
    accelerate launch -m agevlm.training.train stage1_align --data DATA --init-from REPO

    The stage's recipe sets the defaults of all flags. Flags are written with dashes or underscores. --push-to-hub
    pushes the finished stage with its card and a tag, private unless --hub-private-repo False.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or {"-h", "--help"} & set(words):
        help_parser(f"{inspect.cleandoc(train.__doc__ or '')}\n\nSTAGE is one of {', '.join(STAGES)}.").print_help()
        sys.exit(0 if words else 2)

    from .train import main

    main(words)


def init(argv: list[str] | None = None) -> None:
    """Build the model that stage 1 starts from: a published Llama and ConvNeXt, fresh cross blocks.

    agevlm init --output start                      # Llama-3.2-1B-Instruct, LAION CLIP ConvNeXt-L, 768 pixels
    agevlm init --output start --language-model DIR --vision-tower model.safetensors
    agevlm train stage1_align --init_from start --data DATA

    The projector is fresh too; tokenizer and chat template are the Llama's. Parts are folders or Hub repositories of
    safetensors.
    """
    arguments = parse_init(argv)

    from .init import run_verb

    run_verb(arguments)


def parse_init(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of `agevlm init`."""
    parser = VerbParser("init", init.__doc__)
    parser.add_output("folder to make")
    parser.add_argument(
        "--language-model",
        metavar="ID_OR_DIR",
        help=f"any Llama with its tokenizer (default: {LANGUAGE_MODEL}, gated)",
    )
    parser.add_argument(
        "--vision-tower",
        metavar="ID_OR_DIR_OR_FILE",
        help="a ConvNeXt as open_clip, timm or transformers name it, recognized from the names of its weights "
        f"(default: {VISION_TOWER})",
    )
    parser.add_argument(
        "--parts", type=Path, metavar="DIR", help="both of them and the tokenizer from a folder of `agevlm parts`"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"side of the square pictures, a multiple of 32 (default: {IMAGE_SIZE}, or that of --parts)",
    )
    parser.add_argument(
        "--cross-attention-layers",
        type=int,
        nargs="+",
        metavar="INDEX",
        help="places of the cross blocks in the interleaved stack (default: after 2 layers and then after every 4, "
        "which is the paper's 2 7 12 17 for 16 layers)",
    )
    parser.add_argument(
        "--cross-attention-position",
        choices=["after_layer", "after_self_attention"],
        default="after_layer",
        help="whether a cross block follows a whole Llama layer or stands between its self-attention and its MLP "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="how the weights are saved (default: %(default)s, in which training keeps them)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights (default: %(default)s)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve the parts (no weights), print them and the parameter counts, and stop",
    )
    arguments = parser.parse_args(argv)
    if arguments.parts is not None and (arguments.language_model or arguments.vision_tower):
        parser.error("--parts brings both parts: leave out --language-model and --vision-tower")
    arguments.language_model = arguments.language_model or LANGUAGE_MODEL
    arguments.vision_tower = arguments.vision_tower or VISION_TOWER
    return arguments


def parts(argv: list[str] | None = None) -> None:
    """Pretrain the parts that the sizes tiny and small start from: a tokenizer, a Llama and a ConvNeXt.

    agevlm parts tiny --output OUT
    agevlm parts small --output OUT --cutouts DIR
    """
    parser = VerbParser("parts", parts.__doc__)
    parser.add_argument("size", choices=["tiny", "small"])
    parser.add_output("folder to make: the processor, `language_model/`, `vision_tower/`")
    parser.add_argument("--cutouts", type=Path, help="small: folder made by `agevlm data cutouts`")
    parser.add_argument("--conversations", type=int, default=60_000, help="tiny: texts for the language model")
    parser.add_argument("--scenes", type=int, default=40_000, help="pictures for the tower")
    parser.add_argument("--seed", type=int, default=1000, help="apart from the seeds that the quickstart uses")
    arguments = parser.parse_args(argv)

    from .parts import run_verb

    run_verb(arguments)


def push(argv: list[str] | None = None) -> None:
    """Publish a finished checkpoint with its card: one commit, one tag per stage.

    agevlm push runs/agevlm/stage1_align org/agevlm

    A second push does not send again the files that an interrupted one has sent.
    """
    parser = VerbParser("push", push.__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="finished stage, or any AGE-VLM checkpoint")
    repository = parser.add_mutually_exclusive_group()
    repository.add_argument(
        "repo_id", nargs="?", metavar="REPO_ID", help="made if it is not there; default: that of the last push"
    )
    repository.add_argument("--hub-model-id", "--hub_model_id", metavar="REPO_ID", help="the same, as `train` has it")
    parser.add_argument("--public", action="store_true", help="a repository that is made is public, not private")
    parser.add_argument("--branch", help="default: main")
    arguments = parser.parse_args(argv)

    from .publish import run_verb

    run_verb(arguments)
