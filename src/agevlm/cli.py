"""The `agevlm` command: a table of verbs, each a module that is imported only when its verb is called.

Every verb's module has a `main(argv)` with a parser and a `--help` of its own; this file only finds it. The list of
verbs is frozen by `tests/test_cli.py`.
"""

import sys
from importlib import import_module

import typer

from agevlm import __version__


VERBS = {
    "quickstart": (
        "agevlm.reproduction.quickstart",
        "Build data, train every variant through all stages, evaluate, write a report.",
    ),
    "reproduce": (
        "agevlm.reproduction.reproduce",
        "Train and measure every variant, baseline and ablation on scenes; one report with the paper's claims.",
    ),
    "init": (
        "agevlm.training.init",
        "Build the model that stage 1 starts from: a published Llama and ConvNeXt, fresh cross blocks.",
    ),
    "data scenes": (
        "agevlm.data.scenes.build",
        "Compose grounded scenes: pictures, questions, exact masks, benchmarks.",
    ),
    "data cutouts": ("agevlm.data.scenes.fetch_cutouts", "Fetch pictures of named objects to compose scenes of."),
    "data cambrian": (
        "agevlm.data.published.convert",
        "Convert Cambrian, or LLaVA-style JSON, to Parquet that training streams.",
    ),
    "data check": (
        "agevlm.data.published.check",
        "Report what is wrong with a training set, before it costs time on a GPU.",
    ),
    "train": ("agevlm.training.train", "Run one of the four training stages."),
    "eval": (
        "agevlm.evaluation.run",
        "Evaluate models on HallusionBench, OCRBench, CV-Bench, RealWorldQA and POPE, public or of scenes.",
    ),
    "analyze attention": ("agevlm.analysis.attention", "Answer a question about a picture and show where it looked."),
    "analyze similarity": (
        "agevlm.analysis.similarity",
        "Measure whether hidden states tell a picture's own text from another's.",
    ),
    "analyze padding": ("agevlm.analysis.padding", "Measure how much attention goes to padding; pad, stretch, crop."),
    "ground": ("agevlm.grounding.cli", "Make masks from texts: Florence-2 + SAM and others; view, quality, COCO."),
    "convert": ("agevlm.conversion.convert", "Convert a published ConvLLaVA or MobileVLM V2 to transformers."),
    "push": ("agevlm.training.publish", "Publish a finished checkpoint on the Hub: one commit, one tag per stage."),
    "card": ("agevlm.hub_cards.render", "Render the card of a checkpoint or data set from the files in its folder."),
    "export": (
        "agevlm.serving.export",
        "Export a checkpoint to ONNX (also int8) or torch.export, with its processor.",
    ),
    "serve": (
        "agevlm.serving.serve",
        "Serve a checkpoint over HTTP in OpenAI's format, through transformers' own server.",
    ),
    "demo": (
        "agevlm.serving.demo.app",
        "A page to ask about pictures on, and to see where each word of the answer looked.",
    ),
    "env": ("agevlm.env", "Print the versions and the machine: what a bug report needs."),
}
GROUPS = {
    "data": "Make, convert and check training data.",
    "analyze": "Show and measure where a model looks.",
}
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="AGE-VLM: small vision-language models that look where they should.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"agevlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """AGE-VLM: small vision-language models that look where they should."""


def _command(module: str):
    def run(context: typer.Context) -> None:
        import_module(module).main(context.args)

    return run


_groups: dict[str, typer.Typer] = {}
for _verb, (_module, _help) in VERBS.items():
    *_group, _name = _verb.split()
    _target = app
    if _group:
        if _group[0] not in _groups:
            _groups[_group[0]] = typer.Typer(no_args_is_help=True)
            app.add_typer(_groups[_group[0]], name=_group[0], help=GROUPS[_group[0]])
        _target = _groups[_group[0]]
    # Without help options of its own, `--help` reaches the module's parser.
    _target.command(_name, help=_help, context_settings=PASS_THROUGH, add_help_option=False)(_command(_module))


def main() -> None:
    """Entry point. A user's mistake prints as one line, not as a traceback."""
    try:
        app(prog_name="agevlm")
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"agevlm: {error}", err=True)
        sys.exit(2)
