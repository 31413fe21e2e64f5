"""The verbs `quickstart` and `reproduce`: their parsers. What they do is imported once the arguments are parsed."""

from pathlib import Path

from agevlm.arguments import VerbParser


SIZES = ("tiny", "small")
SIZE_HELP = (
    "tiny (default): drawn icons, 10 minutes a seed on 2 CPU cores; small: SmolLM2-135M and cut-out pictures, hours"
)


def quickstart(argv: list[str] | None = None) -> None:
    """Build data, train every variant through all stages, evaluate on unseen scenes, write a report."""
    parser = VerbParser("quickstart", quickstart.__doc__)
    _add_run(parser, Path("runs/quickstart"))
    arguments = parser.parse_args(argv)

    from .quickstart import run_verb

    run_verb(arguments)


def reproduce(argv: list[str] | None = None) -> None:
    """Train and measure every variant, baseline and ablation on scenes, and write one report.

    agevlm reproduce --dry-run                                       # the matrix and its runs
    agevlm reproduce --seeds 0 1 2 --only main --quickstart runs/quickstart
    agevlm reproduce --only guidance normalisation                   # more rows into the same folder
    """
    parser = VerbParser("reproduce", reproduce.__doc__)
    _add_run(parser, Path("runs/reproduce"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows or groups of the matrix (see --dry-run)")
    parser.add_argument("--quickstart", type=Path, help="take finished runs of `agevlm quickstart` from this folder")
    parser.add_argument("--jobs", type=int, help="steps at a time (default: the number of accelerators, else 1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first step that fails")
    parser.add_argument("--dry-run", action="store_true", help="print the matrix and what is to be done")
    arguments = parser.parse_args(argv)

    from .reproduce import run_verb

    run_verb(arguments)


def _add_run(parser: VerbParser, output: Path) -> None:
    """What both verbs have in common."""
    parser.add_argument("--size", choices=SIZES, default="tiny", help=SIZE_HELP)
    parser.add_argument("--output", type=Path, default=output, help="folder (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one training of everything per seed (default: 0)"
    )
    parser.add_argument("--parts", type=Path, help="pretrained tower and language model (default for tiny: ours)")
    parser.add_argument("--cutouts", type=Path, help="small: folder made by `agevlm data cutouts`")
