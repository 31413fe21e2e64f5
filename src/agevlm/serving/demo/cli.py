"""The verb `demo`: its parser. What it does is imported once the arguments are parsed."""

from pathlib import Path

from agevlm.arguments import VerbParser, at_least


TINY = Path("checkpoints/agevlm-tiny")  # in a clone of the repository


def main(argv: list[str] | None = None) -> None:
    """Serve a page that answers questions about a picture and shows where each token looked.

    agevlm demo [MODEL] [SECOND] --port 7860

    For this machine unless `--host` or `--share` open it. Questions wait in one queue, a model answers one at a time.
    Uploads are deleted after an hour. Nothing is loaded from or sent to the network, whatever a client asks for.

    Raises:
        ValueError: no model is given outside of a clone, which has one.
    """
    parser = VerbParser("demo", (main.__doc__ or "").split("    Raises:")[0])
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder or Hub id of a checkpoint, ours or of another vision-language model (default, in a clone of the "
        f"repository: {TINY})",
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
    if options.model is None:
        if not TINY.is_dir():
            raise ValueError("give a model: `agevlm demo MODEL`, with a folder of `agevlm train` or a Hub id")
        options.model = str(TINY)

    from .app import run_verb

    run_verb(options)
