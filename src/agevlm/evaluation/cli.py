"""The verbs `eval` and `results`: their parsers. What they do is imported once the arguments are parsed."""

from pathlib import Path

from agevlm.arguments import VerbParser

from .benchmark import PROTOCOLS
from .registry import BENCHMARKS, TEXT_ONLY


DEFAULT_JUDGE = "Qwen/Qwen2.5-7B-Instruct"


def evaluate(argv: list[str] | None = None) -> None:
    """Evaluate models on own questions, and on HallusionBench, OCRBench, CV-Bench, RealWorldQA and POPE.

    Measured are answers, scores, baselines, a judge's reading, and where the model looked.

    agevlm eval MODEL... --output DIR                                   # the published sets, from the Hub
    agevlm eval MODEL... --data own.jsonl --output DIR                  # own questions: image, question, answer
    agevlm eval MODEL... --data FOLDER --output DIR                     # the published columns in a folder
    agevlm eval MODEL... --scenes FOLDER --split composition --output DIR
    agevlm eval MODEL... --masks FILE --output DIR                      # where it looks, without questions
    agevlm eval MODEL... --language TEXT --output DIR                   # perplexity of a text, without questions
    accelerate launch -m agevlm eval MODEL... --output DIR              # several processes
    """
    parser = VerbParser("eval", evaluate.__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub id: ours, or any image-text-to-text")
    known, told = ", ".join(BENCHMARKS), ", ".join(TEXT_ONLY)
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help=f"all, or out of {known} (default: all; own for a file; none with --masks or --language and no rows); "
        f"of text alone: {told}",
    )
    parser.add_argument(
        "--protocol", default="paper", help=f"whose prompts and reading: {', '.join(PROTOCOLS)} (default: %(default)s)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="one folder per model is made in it")
    rows = parser.add_argument_group("rows (default: the published sets, from the Hub)")
    rows.add_argument("--scenes", metavar="DIR", help="folder made by `agevlm data scenes`")
    rows.add_argument("--split", default="composition", help="of scenes: composition, name or style")
    rows.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE|DIR|NAME=PLACE",
        help="a file (.jsonl, .json, .csv, .parquet) is own questions: image, question, answer, maybe kind (yes-no, "
        "choice, exact, contains), options, id, category, mask; or conversations as training takes them. A folder has "
        "files in the published columns. NAME=PLACE is a file, folder or Hub id for one benchmark",
    )
    rows.add_argument(
        "--images", metavar="DIR", help="folder of the pictures that rows of --data name (default: theirs)"
    )
    rows.add_argument("--masks", metavar="FILE", help="Parquet of image, question, mask: measure looking on it too")
    rows.add_argument(
        "--rows", metavar="ROWS", help="rows that --masks of `agevlm ground` belong to: file, folder, Hub id"
    )
    rows.add_argument(
        "--language",
        metavar="TEXT",
        help="file of text, Hub set (ID or ID:CONFIG) or folder of scenes: measure the perplexity of it too",
    )
    rows.add_argument("--limit", type=int, help="first rows of each benchmark only")
    rows.add_argument("--strict", action="store_true", help="stop at a bad row instead of skipping it")
    loading = parser.add_argument_group("models")
    loading.add_argument("--revision", default="main", help="of the models on the Hub")
    loading.add_argument("--adapter", metavar="DIR", help="PEFT adapter (folder or Hub id) laid over the one model")
    loading.add_argument("--four-bit", action="store_true", help="NF4 weights (needs bitsandbytes)")
    loading.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--batch-size", type=int, default=32)
    answers.add_argument("--max-new-tokens", type=int, help="longest answer (default: the protocol's)")
    answers.add_argument(
        "--judge",
        nargs="?",
        const=DEFAULT_JUDGE,
        metavar="MODEL",
        help=f"a chat model reads every answer a second time (without a name: {DEFAULT_JUDGE})",
    )
    arguments = parser.parse_args(argv)

    from .run import run_verb

    run_verb(arguments)


def results(argv: list[str] | None = None) -> None:
    """Write the results page (docs/results.md) out of `metrics.json` files, beside the paper's Table 2.

    agevlm results docs/results/*/metrics.json --output docs/results.md
    """
    parser = VerbParser("results", results.__doc__)
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.json files of `agevlm eval`")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)

    from .leaderboard import run_verb

    run_verb(arguments)
