"""The `agevlm` command: a table of verbs, each imported only when it is called.

Every verb is a function of `argv` with a parser and a `--help` of its own; this file only finds it. The list of verbs
is frozen by `tests/test_cli.py`.
"""

import difflib
import errno
import sys
import textwrap
from importlib import import_module

from agevlm import __version__


# Verb -> (module:function, what it does)
VERBS = {
    "quickstart": (
        "agevlm.reproduction.cli:quickstart",
        "Build data, train every variant through all stages, evaluate, write a report.",
    ),
    "reproduce": (
        "agevlm.reproduction.cli:reproduce",
        "Train and measure every variant, baseline and ablation on scenes; one report with the paper's claims.",
    ),
    "init": (
        "agevlm.training.cli:init",
        "Build the model that stage 1 starts from: a published Llama and ConvNeXt, fresh cross blocks.",
    ),
    "parts": ("agevlm.training.cli:parts", "Pretrain the parts that the sizes tiny and small start from."),
    "data scenes": (
        "agevlm.data.cli:scenes",
        "Compose grounded scenes: pictures, questions, exact masks, benchmarks.",
    ),
    "data cutouts": ("agevlm.data.cli:cutouts", "Fetch pictures of named objects to compose scenes of."),
    "data cambrian": (
        "agevlm.data.cli:cambrian",
        "Convert Cambrian, or LLaVA-style JSON, to Parquet that training streams.",
    ),
    "data check": (
        "agevlm.data.cli:check",
        "Report what is wrong with a training set, before it costs time on a GPU.",
    ),
    "train": ("agevlm.training.cli:train", "Run one of the four training stages."),
    "eval": (
        "agevlm.evaluation.cli:evaluate",
        "Evaluate models on HallusionBench, OCRBench, CV-Bench, RealWorldQA and POPE, public or of scenes.",
    ),
    "results": ("agevlm.evaluation.cli:results", "Write the results page out of `metrics.json` files of `eval`."),
    "analyze attention": ("agevlm.analysis.cli:attention", "Answer a question about a picture; show where it looked."),
    "analyze similarity": (
        "agevlm.analysis.cli:similarity",
        "Measure whether hidden states tell a picture's own text from another's.",
    ),
    "analyze padding": (
        "agevlm.analysis.cli:padding",
        "Measure how much attention goes to padding; pad, stretch, crop.",
    ),
    "analyze architecture": ("agevlm.analysis.cli:architecture", "Draw a model as in the paper's figure 3."),
    "ground": ("agevlm.grounding.cli:ground", "Make masks from texts: Florence-2 + SAM and others."),
    "ground view": ("agevlm.grounding.cli:view", "Make a page of pictures with their masks."),
    "ground quality": ("agevlm.grounding.cli:quality", "Compare masks with exact masks: IoU, boundary F, grid IoU."),
    "ground export": ("agevlm.grounding.cli:export_coco", "Write kept masks as COCO annotations."),
    "ground import": ("agevlm.grounding.cli:import_coco", "Read COCO annotations as masks."),
    "convert": ("agevlm.conversion.cli:main", "Convert a published ConvLLaVA or MobileVLM V2 to transformers."),
    "push": (
        "agevlm.training.cli:push",
        "Publish a finished checkpoint on the Hub: one commit, one tag per stage.",
    ),
    "card": ("agevlm.hub_cards.cli:main", "Render the card of a checkpoint or data set from the files in its folder."),
    "export": (
        "agevlm.serving.export:main",
        "Export a checkpoint to ONNX (also int8) or torch.export, with its processor.",
    ),
    "serve": (
        "agevlm.serving.serve:main",
        "Serve a checkpoint over HTTP in OpenAI's format, through transformers' own server.",
    ),
    "demo": (
        "agevlm.serving.demo.cli:main",
        "A page to ask about pictures on, and to see where each word of the answer looked.",
    ),
    "env": ("agevlm.env:main", "Print the versions and the machine: what a bug report needs."),
}
_WIDTH = 21
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
    errno.ENOSPC: "free some space, or choose a path on another disk",
    errno.EDQUOT: "free some space, or choose a path on another disk",
}


def find(words: list[str]) -> str | None:
    """The verb that the words begin with; of `ground` and `ground view` the longer one."""
    return next((verb for verb in (" ".join(words[:2]), words[0]) if verb in VERBS), None)


def overview(group: str | None = None) -> str:
    """The help of all verbs, or of those that begin with `group`."""
    chosen = {verb: text for verb, (_, text) in VERBS.items() if group is None or verb.split()[0] == group}
    lines = [
        f"usage: agevlm {group or 'VERB'}{' VERB' if group else ''} ...",
        "",
        "AGE-VLM: small vision-language models that look where they should.",
        "`agevlm VERB --help` lists the arguments of a verb, `agevlm --version` prints the version.",
        "",
    ]
    for verb, text in chosen.items():
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
        module, function = VERBS[verb][0].split(":")
        getattr(import_module(module), function)(words[len(verb.split()) :])
        return
    if words[0] in groups and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(overview(words[0]))
        sys.exit(0 if len(words) > 1 else 2)
    asked = " ".join(words[:2] if words[0] in groups else words[:1])
    close = difflib.get_close_matches(asked, VERBS, n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`agevlm --help` lists them"
    raise ValueError(f"there is no verb {asked!r}; {hint}")


def one_line(error: OSError) -> str:
    """A system error with its path and what to do about it."""
    if error.errno is None or error.strerror is None:
        if isinstance(error, ConnectionError):
            return f"{error}; check the connection, or give a folder of this machine".removeprefix("; ")
        return str(error) or type(error).__name__
    path = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    fix = "check the connection" if isinstance(error, (ConnectionError, TimeoutError)) else _FIXES.get(error.errno)
    return ": ".join(filter(None, (path, error.strerror))) + (f"; {fix}" if fix else "")


def main() -> None:
    """Entry point. A user's mistake prints as one line with status 2, not as a traceback."""
    try:
        dispatch(sys.argv[1:])
    except ValueError as error:
        sys.exit(_refuse(str(error)))
    except OSError as error:
        sys.exit(_refuse(one_line(error)))


def _refuse(message: str) -> int:
    print(f"agevlm: {message}", file=sys.stderr)
    return 2
