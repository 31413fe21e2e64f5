"""Results of several models as tables: on the console (the headlines), in Markdown and HTML (every metric)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from rich.table import Table as ConsoleTable
from rich.text import Text

from .benchmark import Metrics
from .looking import METRICS as GROUNDING_METRICS


Results = Mapping[str, Metrics]  # metrics by model
Lines = list[list[str]]  # the first is the head
NO_RACE = ("yes_ratio", "false_yes", "unparsed", "unjudged", "n")  # metrics of which more is not better


def leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and values of nested metrics; lists count as values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def lookup(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a path, None where there is none."""
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def shown_metrics(result: Metrics) -> list[str]:
    """The metrics that stand for a benchmark where there is no room for all."""
    return result.get("shown") or [result["headline"]]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _with_interval(result: Metrics, path: Sequence[str]) -> str:
    value, bounds = lookup(result, path), lookup(result.get("intervals", {}), path)
    return _number(value) if bounds is None else f"{_number(value)} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def without_looking(result: Metrics, path: Sequence[str]) -> str:
    """The best value that answers given without looking reach, and which do; empty where more is not better."""
    found = {name: lookup(scores, path) for name, scores in result["constants"].items()}
    found = {name: value for name, value in found.items() if value is not None}
    if path[-1] in NO_RACE or not found:
        return ""
    best = max(found, key=lambda name: found[name])
    return f"{_number(found[best])} ({best})"


def benchmark_lines(results: Results, name: str, *, brief: bool = False) -> Lines:
    """Every metric of one benchmark: with its interval, as the judge reads it, and without looking.

    Args:
        brief: of the metrics of a category, keep those of `shown_metrics`.
    """
    found = {model: metrics["benchmarks"][name] for model, metrics in results.items()}
    first = next(iter(found.values()))
    lines = [["", *found, "without looking"]]
    kept = shown_metrics(first)
    for path, _ in leaves(first["intervals"]):
        if brief and len(path) > 2 and path[-1] not in kept:
            continue
        lines.append(
            [" ".join(path), *(_with_interval(r, path) for r in found.values()), without_looking(first, path)]
        )
    lines.append(["rows (skipped)", *(f"{r['n']} ({r['skipped']})" for r in found.values()), ""])
    if not any("judged" in result for result in found.values()):
        return lines
    judged = {model: result.get("judged", {}) for model, result in found.items()}
    for path, _ in leaves(next(value for value in judged.values() if value)["intervals"]):
        if path != ("unparsed",):
            lines.append([f"judged: {' '.join(path)}", *(_with_interval(r, path) for r in judged.values()), ""])
    paths = (
        ("unjudged",), ("agreement",), ("agreement_n",),
        ("rule_then_judge", first["headline"]), ("rule_then_judge", "share_judged"),
    )  # fmt: skip
    lines += [[f"judged: {' '.join(p)}", *(_number(lookup(r, p)) for r in judged.values()), ""] for p in paths]
    return lines


def grounding_lines(found: Mapping[str, Metrics]) -> Lines:
    """Where models looked, by cross layer, and two ways of not looking; empty if nothing was measured."""
    found = {model: metrics for model, metrics in found.items() if metrics.get("n")}
    if not found:
        return []
    first = next(iter(found.values()))
    lines = [["", *found, "uniform", "center prior"]]
    for metric in GROUNDING_METRICS:
        blind = [f"{first[baseline][metric]:.3f}" for baseline in ("uniform", "centre")]
        name = metric.replace("_", " ")
        lines.append([name, *(f"{m[metric]['mean']:.3f}" for m in found.values()), *blind])
        for index, layer in enumerate(first["layers"]):
            values = [
                f"{m[metric]['per_layer'][index]:.3f}" if m["layers"] == first["layers"] else "–"
                for m in found.values()
            ]
            lines.append([f"{name}, layer {layer}", *values, "", ""])
    lines.append(["rows (skipped)", *(f"{m['n']} ({m['skipped']})" for m in found.values()), "", ""])
    return lines


def language_lines(results: Results) -> Lines:
    """How well models predict a held text; empty if nothing was measured."""
    found = {model: metrics["language"] for model, metrics in results.items() if "language" in metrics}
    lines = [["", *found], ["text", *(f"{m['text']} ({m['tokens']:,} tokens)" for m in found.values())]]
    for name in ("perplexity", "bits_per_byte"):
        lines.append([name.replace("_", " "), *(f"{m[name]:.4g}" for m in found.values())])
    return lines if found else []


def comparison_lines(comparisons: Sequence[Mapping[str, Any]]) -> Lines:
    """Paired differences of two models."""
    lines = [["benchmark", "second − first", "metric", "difference [95 %]", "p (bootstrap)", "only first, only second "
              "right", "p (McNemar)"]]  # fmt: skip
    for line in comparisons:
        low, high = line["interval"]
        test = line["mcnemar"]
        lines.append(
            [
                line["benchmark"],
                f"{line['second']} − {line['first']}",
                line["metric"],
                f"{line['difference']:+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{line['p']:.3f}",
                f"{test['only_first']}, {test['only_second']}",
                f"{test['p']:.3f}",
            ]
        )
    return lines


def sections(results: Results, comparisons: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Lines]]:
    """(title, note, table) of a page of results."""
    first = next(iter(results.values()))
    for name, result in first["benchmarks"].items():
        scored = " Its result is the judged column alone." if result["judged_only"] else ""
        judge = f" Judge: {first['judge']}." if first["judge"] else " No judge."
        note = f"Protocol {result['protocol']}.{judge}{scored} {result.get('note', '')}".rstrip()
        yield name, note, benchmark_lines(results, name)
    pooled = grounding_lines({model: metrics["grounding"] for model, metrics in results.items()})
    if pooled:
        yield "Where they look", "Rows of all benchmarks that have a mask; shares and areas from 0 to 1.", pooled
    masked = grounding_lines({model: metrics.get("masked", {}) for model, metrics in results.items()})
    if masked:
        yield "Where they look, rows of their own", "The rows given by --masks.", masked
    language = language_lines(results)
    if language:
        yield "Language ability", "Text without pictures; perplexities compare models with one tokenizer.", language
    if comparisons:
        note = "Paired over the same rows; p is the chance of such a difference between equals."
        yield "Differences", note, comparison_lines(comparisons)


def markdown_table(lines: Lines) -> str:
    head, *rest = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    # Columns of words on the left, of numbers on the right
    worded = [
        any(line[column][:1].isalpha() or line[column][:2] == "**" for line in rest) for column in range(len(head))
    ]
    rule = ["---" if column == 0 or words else "---:" for column, words in enumerate(worded)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rest)) + "\n"


def _title(results: Results) -> str:
    first = next(iter(results.values()))
    split = f", split {first['split']}" if first["data"] == "scenes" else ""
    return f"Evaluation: {first['data']}{split}, protocol {first['protocol']}"


_NOTE = (
    "Percentages, but for counts of OCRBench. In brackets: bootstrap 95 % intervals over the questions. “Without "
    "looking”: the best that a constant answer or chance reaches."
)


def markdown_page(results: Results, comparisons: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"# {_title(results)}\n", f"{_NOTE}\n"]
    for title, note, lines in sections(results, comparisons):
        parts += [f"## {title}\n", f"{note}\n", markdown_table(lines)]
    return "\n".join(parts)


def page_environment(*rooms: str, **filters: Callable[..., Any]) -> Environment:
    """Templates of this room, which share one frame, and of the rooms above that fill it; `picture` is one of the
    filters."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"agevlm.{room}") for room in (*rooms, "evaluation")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"picture": str, **filters}
    return environment


def html_page(
    results: Results,
    comparisons: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Sequence[Mapping[str, Any]]],
    errors: Mapping[str, Mapping[str, Any]],
) -> str:
    """One file that needs nothing else. `predictions`, `errors`: model -> answers to own questions, `draw_errors`."""
    made = [
        {"title": title, "note": note, "lines": lines, "picture": None}
        for title, note, lines in sections(results, comparisons)
    ]
    page = {"title": _title(results), "note": _NOTE, "sections": made}
    return page_environment().get_template("results.html.jinja").render(page, predictions=predictions, errors=errors)


def summary_table(results: Results) -> ConsoleTable:
    """One line per headline, one column per model, and what the same number is without looking."""
    first = next(iter(results.values()))
    lines = []
    for name, result in first["benchmarks"].items():
        found = [metrics["benchmarks"][name] for metrics in results.values()]
        for metric in shown_metrics(result):
            cells = [_with_interval(r, (metric,)) for r in found]
            lines.append([f"{name} {metric}", *cells, without_looking(result, (metric,))])
        if any("judged" in r for r in found):
            path = ("judged", result["headline"])
            lines.append([f"{name} {path[1]}, judged", *(_number(lookup(r, path)) for r in found), ""])
        lines.append([f"{name} unparsed %", *(_number(r["unparsed"]) for r in found), ""])
        if any(r["skipped"] for r in found):
            lines.append([f"{name} rows (skipped)", *(f"{r['n']} ({r['skipped']})" for r in found), ""])
    for place, where in (("grounding", ""), ("masked", ", --masks")):
        for metric in GROUNDING_METRICS if lookup(first, (place, "n")) else ():
            values = [lookup(metrics, (place, metric, "mean")) for metrics in results.values()]
            cells = ["–" if value is None else f"{value:.3f}" for value in values]
            name = metric.replace("_", " ") + where
            lines.append([name, *cells, f"{first[place]['uniform'][metric]:.3f} (uniform)"])
    if "masked" in first:
        counts = [metrics["masked"] for metrics in results.values()]
        lines.append(["rows of --masks (skipped)", *(f"{m['n']} ({m['skipped']})" for m in counts), ""])
    if any("language" in metrics for metrics in results.values()):
        values = [lookup(metrics, ("language", "perplexity")) for metrics in results.values()]
        lines.append(["text perplexity", *("–" if value is None else f"{value:.4g}" for value in values), ""])
    table = ConsoleTable(title=Text(_title(results)))  # names and answers are text, not markup
    for column, head in enumerate(["", *results, "without looking"]):
        table.add_column(Text(head), justify="right" if 0 < column <= len(results) else "left")
    for line in lines:
        table.add_row(*map(Text, line))
    return table
