"""The verbs `quickstart` and `reproduce`: their parsers. The implementation is imported after parsing."""

import argparse
import os
from pathlib import Path

from agevlm.arguments import VerbParser, at_least


SIZES = ("tiny-scratch", "tiny", "clutter", "clutter-few", "clutter-able", "crowd", "small")
SIZE_HELP = (
    "tiny-scratch (default): one to three drawn icons, a language model from scratch, 7 minutes on two cores; tiny: "
    "a pretrained language model of 0.8M; clutter, clutter-able: the same with four to six small icons; clutter-few: "
    "clutter with 5,500 questions, each asked 16 times; crowd, from scratch: six to ten icons; small: SmolLM2-135M "
    "and cut-out pictures, half an hour a row"
)


class _Once(argparse.Action):
    """Refuses a second value: `--quickstart` and `--output` were two folders before."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option_string} is given twice; scenes, runs and report lie in one folder")
        setattr(namespace, self.dest, values)


def quickstart(argv: list[str] | None = None) -> None:
    """Train a model without guidance, the paper's, and one guided phrase by phrase; evaluate on unseen scenes, report.

    The same as `agevlm reproduce --only quickstart --strict`; that verb adds other rows to the folder.
    """
    parser = VerbParser("quickstart", quickstart.__doc__)
    _add_run(parser, Path("runs/quickstart"))
    parser.set_defaults(only=["quickstart"], strict=True, dry_run=False)
    _run(parser.parse_args(argv))


def reproduce(argv: list[str] | None = None) -> None:
    """Train and measure every variant, baseline and ablation on scenes, and write one report.

    agevlm reproduce --dry-run                                       # the matrix and its runs
    agevlm reproduce --seeds 0 1 2 --only main --output runs/quickstart
    agevlm reproduce --only guidance normalization                   # more rows into the same folder

    Several calls may work on one folder: each waits for a run that another one is doing. A call uses the first
    accelerator, or the one that CUDA_VISIBLE_DEVICES names.
    """
    parser = VerbParser("reproduce", reproduce.__doc__)
    _add_run(parser, Path("runs/reproduce"))
    parser.rename("--quickstart", "--output")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows or groups of the matrix (see --dry-run)")
    parser.add_argument("--strict", action="store_true", help="stop at the first step that fails")
    parser.add_argument("--dry-run", action="store_true", help="print the matrix and what is to be done")
    _run(parser.parse_args(argv))


def _add_run(parser: VerbParser, output: Path) -> None:
    """What both verbs have in common."""
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help=SIZE_HELP)
    parser.add_argument("--output", type=Path, action=_Once, default=output, help="folder (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=at_least(0), nargs="+", default=[0], help="one training of everything per seed (default: 0)"
    )
    parser.add_argument(
        "--parts", type=Path, help="pretrained tower and language model (default: ours, but for small)"
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        help="steps at a time, which share the cores (default: 2; with an accelerator 1)",
    )
    parser.add_argument("--cutouts", type=Path, help="small: folder made by `agevlm data cutouts`")
    parser.add_argument("--questions", type=Path, help="own questions that every row answers too (eval's --data)")
    parser.add_argument(
        "--text", type=Path, help="text whose perplexity is measured around every stage (default: scenes in words)"
    )


def _run(arguments: argparse.Namespace) -> None:
    # Every process of a run sees one accelerator. It must be set before torch looks for them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

    from .reproduce import run_verb

    run_verb(arguments)
