"""The verb `demo`: its parser. What it does is imported once the arguments are parsed."""

from agevlm import TINY
from agevlm.arguments import VerbParser, at_least


def main(argv: list[str] | None = None) -> None:
    """Serve a page that answers questions about a picture and shows where each token looked.

    agevlm demo [MODEL] [SECOND] --port 7860

    For this machine unless `--host` or `--share` open it. Questions wait in one queue, a model answers one at a time.
    Uploads are deleted after an hour. Nothing is loaded from or sent to the network, whatever a client asks for.
    """
    parser = VerbParser("demo", main.__doc__)
    parser.add_argument(
        "model",
        nargs="?",
        default=str(TINY),
        metavar="MODEL",
        help="folder or Hub id of a checkpoint, ours or of another vision-language model (default: the tiny one that "
        "comes with the package)",
    )
    parser.add_argument("second", nargs="?", metavar="SECOND", help="another one, which answers beside the first")
    parser.add_argument("--host", default="127.0.0.1", help="any other opens it to the network (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="open a public address through Gradio's servers")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a checkpoint that is not ours"
    )
    options = parser.parse_args(argv)

    from .app import run_verb

    run_verb(options)
