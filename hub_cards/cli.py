"""The verb `card`: its parser. The implementation is imported after the arguments are parsed."""

from pathlib import Path

from agevlm.arguments import VerbParser


def main(argv: list[str] | None = None) -> None:
    """Render the card (README.md) of a checkpoint, or scenes or masks, from the files in its folder.

    agevlm card runs/agevlm/stage4_instruct
    agevlm card runs/agevlm/stage4_instruct --evaluation runs/evaluation/stage4_instruct/metrics.json
    agevlm card scenes                                  # a data set
    """
    parser = VerbParser("card", main.__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="checkpoint, or folder of scenes or masks")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="metrics.json of `agevlm eval`: is copied into the folder"
    )
    parser.add_argument(
        "--dataset", metavar="ID", help="with --evaluation: the Hub data set of the benchmarks, for .eval_results"
    )
    parser.add_argument(
        "--attention", type=Path, metavar="FILE.png", help="picture of `agevlm analyze attention`: copied likewise"
    )
    arguments = parser.parse_args(argv)

    from .render import run_verb

    run_verb(arguments)
