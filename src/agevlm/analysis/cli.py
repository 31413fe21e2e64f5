"""The verbs of `agevlm analyze`: their parsers. The implementation is imported after the arguments are parsed."""

from pathlib import Path

from agevlm.arguments import VerbParser, at_least
from agevlm.store import locked


def attention(argv: list[str] | None = None) -> None:
    """Answer a question about a picture and show where it looked; several models side by side."""
    parser = VerbParser("analyze attention", attention.__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub id of a checkpoint; several compare")
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--mask", metavar="FILE", help="black and white picture of what the question is about")
    parser.add_argument("--phrases", nargs="+", default=[], metavar="WORDS", help="of the question, for a map of each")
    parser.add_argument(
        "--layer",
        type=int,
        action="append",
        dest="layers",
        metavar="N",
        help="may be given again; default: all cross layers, or the first self-attention layer",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    _add_trust(parser)
    arguments = parser.parse_args(argv)

    from .attention import run_verb

    with locked(Path(arguments.output), wait=False):
        run_verb(arguments)


def similarity(argv: list[str] | None = None) -> None:
    """Measure whether a model's hidden states tell a picture's own text from another's (figure 2)."""
    parser = VerbParser("analyze similarity", similarity.__doc__)
    _add_data(parser, "folder of scenes (its captions), or a .parquet or .jsonl of pairs", "pairs", 1000)
    parser.add_argument(
        "--seeds", type=at_least(1), default=3, metavar="N", help="number of mismatched pairings (default 3)"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, metavar="N")
    arguments = parser.parse_args(argv)

    from .similarity import run_verb

    with locked(Path(arguments.output), wait=False):
        run_verb(arguments)


def padding(argv: list[str] | None = None) -> None:
    """Measure how much attention goes to padding, and what padding, stretching and cropping change (appendix C)."""
    parser = VerbParser("analyze padding", padding.__doc__)
    _add_data(parser, "folder of scenes, or a .parquet or .jsonl with pictures and texts", "pictures", 200)
    arguments = parser.parse_args(argv)

    from .padding import run_verb

    with locked(Path(arguments.output), wait=False):
        run_verb(arguments)


def architecture(argv: list[str] | None = None) -> None:
    """Draw a model as in the paper's figure 3: its parts, the guidance loss, and what trains in which stage."""
    parser = VerbParser("analyze architecture", architecture.__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder or Hub id of a checkpoint of ours; default: the paper's model",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.svg")
    arguments = parser.parse_args(argv)

    from .architecture import run_verb

    run_verb(arguments)


def _add_data(parser: VerbParser, data: str, things: str, limit: int) -> None:
    """The arguments shared by the verbs that measure a model on many rows."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of ours or of a concatenating model")
    parser.add_argument("data", metavar="DATA", help=data)
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--text", metavar="COLUMN", help="default: the first answer of `messages`, caption or question"
    )
    parser.add_argument("--limit", type=at_least(2), default=limit, metavar="N", help=f"{things} (default {limit})")
    parser.add_argument("--strict", action="store_true", help="stop at a bad row instead of leaving it out")
    _add_trust(parser)


def _add_trust(parser: VerbParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a checkpoint that is not ours"
    )
