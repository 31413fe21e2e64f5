"""The `agevlm` command: a table of verbs, each imported only when it is called.

Every verb is a function of `argv` with a parser and a `--help` of its own; this file only finds it. The list of verbs
is frozen by `tests/test_cli.py`.
"""

import difflib
import errno
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module

from agevlm import __version__
from agevlm.progress import lines


# Verb -> module below `agevlm`, and its function; the first line of its docstring says what it does
VERBS = {
    "quickstart": "reproduction.cli:quickstart",
    "reproduce": "reproduction.cli:reproduce",
    "init": "training.cli:init",
    "parts": "training.cli:parts",
    "data scenes": "data.cli:scenes",
    "data cutouts": "data.cli:cutouts",
    "data photographs": "data.cli:photographs",
    "data import": "grounding.cli:import_data",
    "data cambrian": "data.cli:cambrian",
    "data check": "data.cli:check",
    "train": "training.cli:train",
    "eval": "evaluation.cli:evaluate",
    "results": "evaluation.cli:results",
    "analyze attention": "analysis.cli:attention",
    "analyze similarity": "analysis.cli:similarity",
    "analyze padding": "analysis.cli:padding",
    "analyze architecture": "analysis.cli:architecture",
    "ground": "grounding.cli:ground",
    "ground view": "grounding.cli:view",
    "ground quality": "grounding.cli:quality",
    "ground export": "grounding.cli:export_coco",
    "ground import": "grounding.cli:import_coco",
    "convert": "conversion.cli:main",
    "push": "training.cli:push",
    "card": "hub_cards.cli:main",
    "export": "serving.export:main",
    "serve": "serving.serve:main",
    "demo": "serving.demo.cli:main",
    "env": "env:main",
}
_WIDTH = 21
_ENDLESS = ("serve", "demo")  # they are never nearly done
# What to do about a system error, by its number
_FIXES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file is where a folder is needed; choose another path",
    errno.EISDIR: "a folder is where a file is needed; choose another path",
    errno.EEXIST: "it is there already; choose another path",
    errno.ENOTEMPTY: "the folder is in use; choose another path",
    errno.EACCES: "change the permissions, or choose another path",
    errno.EPERM: "change the permissions, or choose another path",
    errno.EROFS: "the disk is read-only; choose a path on another one",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`), or choose a path on another disk",
    errno.ENOSPC: "free some space, or choose a path on another disk",
    errno.EDQUOT: "free some space, or choose a path on another disk",
}


def find(words: list[str]) -> str | None:
    """The verb that the words begin with; of `ground` and `ground view` the longer one."""
    return next((verb for verb in (" ".join(words[:2]), words[0]) if verb in VERBS), None)


def function_of(verb: str) -> Callable[[list[str]], None]:
    """What runs a verb."""
    module, name = VERBS[verb].split(":")
    return getattr(import_module(f"agevlm.{module}"), name)


def overview(group: str | None = None) -> str:
    """The help of all verbs, or of those that begin with `group`."""
    lines = [
        f"usage: agevlm {group or 'VERB'}{' VERB' if group else ''} ...",
        "",
        "AGE-VLM: small vision-language models that look where they should.",
        "`agevlm VERB --help` lists the arguments of a verb, `agevlm --version` prints the version.",
        "",
    ]
    for verb in VERBS:
        if group not in (None, verb.split()[0]):
            continue
        text = (function_of(verb).__doc__ or "").split("\n", 1)[0]
        lines += textwrap.wrap(text, 100, initial_indent=f"  {verb:<{_WIDTH}}", subsequent_indent=" " * (_WIDTH + 2))
    return "\n".join(lines)


def dispatch(words: list[str]) -> None:
    """Run the verb of a command line.

    Raises:
        ValueError: there is no such verb.
        SystemExit: a help or a usage message was printed.
    """
    groups = {verb.split()[0] for verb in VERBS if " " in verb}
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"agevlm {__version__}")
        return
    verb = find(words)
    if verb is not None:
        with nullcontext() if verb in _ENDLESS or sys.stderr.isatty() else lines(verb):
            function_of(verb)(words[len(verb.split()) :])
        return
    if words[0] in groups and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(overview(words[0]))
        sys.exit(0 if len(words) > 1 else 2)
    asked = " ".join(words[:2] if words[0] in groups else words[:1])
    close = difflib.get_close_matches(asked, VERBS, n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`agevlm --help` lists them"
    raise ValueError(f"there is no verb {asked!r}; {hint}")


def one_line(error: Exception) -> str | None:
    """A user's mistake, or a system error with its path and what to do about it; None for any other error."""
    if isinstance(error, ValueError):
        return str(error)
    if not isinstance(error, OSError):  # safetensors and torch say nothing of the file that they write
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            error = OSError(int(number[1]), f"a file cannot be written: {os.strerror(int(number[1]))}")
        elif "inline_container" in str(error):  # torch's archives, which know no reason
            error = OSError(errno.ENOSPC, "a file cannot be written to its end")
        else:
            return None
    if error.errno is None or error.strerror is None:
        if isinstance(error, ConnectionError):
            return f"{error}; check the connection, or give a folder of this machine".removeprefix("; ")
        return str(error) or type(error).__name__
    path = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    fix = "check the connection" if isinstance(error, (ConnectionError, TimeoutError)) else _FIXES.get(error.errno)
    return ": ".join(filter(None, (path, error.strerror))) + (f"; {fix}" if fix else "")


def main() -> None:
    """Entry point. A user's mistake prints as one line with status 2, not as a traceback. SIGTERM (a time limit, a
    container that stops) ends a verb as Ctrl-C does: its clean-up runs."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        dispatch(sys.argv[1:])
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print("agevlm: interrupted; the same command resumes or begins again", file=sys.stderr)
        sys.exit(128 + number)
    except Exception as error:
        said = one_line(error)
        if said is None:
            raise
        print(f"agevlm: {said}", file=sys.stderr)
        sys.exit(2)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)
