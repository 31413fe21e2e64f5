"""Evaluates models on benchmarks: answers, scores, baselines, a judge's reading, and where the model looked.

Each model's folder receives `metrics.json` (docs/evaluation.md) and, per benchmark, `predictions.jsonl` (raw outputs),
`run.json`, `judged.jsonl` and `grounding.jsonl`; the folder above `results.md`, `results.html` and, of several models,
`comparison.json`. The same call again goes on where it stopped, or returns at once.
"""

import argparse
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import snapshot_download
from rich.console import Console

from agevlm.data.rows import content_digest
from agevlm.data.scenes.build import load_benchmark, load_told
from agevlm.hub_cards.facts import weights_fingerprint
from agevlm.language import perplexity, read_held_text
from agevlm.models import load, unique_names, weights_digest
from agevlm.progress import written
from agevlm.stats import mcnemar, paired_difference
from agevlm.store import check_same, digest, locked, read_json, read_lines, write_json, write_lines, write_text

from .benchmark import PROTOCOLS, Benchmark, Metrics, Row, units_of
from .errors import draw_errors
from .generate import PREDICTIONS, Prediction, generate_predictions
from .inputs import PICTURES
from .inputs import without_pictures as plain
from .judge import Judge, judge_rows, score_judged
from .looking import Look, load_masked, marked_rows, measure_looking, summarize
from .own_rows import load_own
from .processes import current_device, is_main
from .registry import BENCHMARKS, EVERY, OWN, TEXT_ONLY
from .sources import load_hub, load_local, prepare
from .tables import html_page, markdown_page, summary_table


RESULT = "metrics.json"
FORMAT = 5  # raise when fields of metrics.json change, or what they mean


def choose(names: Sequence[str], protocol: str = "paper") -> list[Benchmark]:
    """Benchmarks by name under one protocol; ["all"] is those of pictures that have it.

    Raises:
        ValueError: an unknown name or protocol, or a benchmark that has no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; use {', '.join(PROTOCOLS)}")
    if list(names) == ["all"]:
        return [known[protocol] for known in BENCHMARKS.values() if protocol in known]
    unknown = [name for name in names if name not in EVERY]
    if unknown or not names:
        known = ", ".join(EVERY)
        raise ValueError(f"unknown benchmark {', '.join(unknown) or '(none given)'}; use {known}, or all alone")
    without = [name for name in names if protocol not in EVERY[name]]
    if without:
        raise ValueError(
            f"{without[0]} has no protocol {protocol!r}: that harness does not score it; it has "
            f"{', '.join(EVERY[without[0]])}"
        )
    return [EVERY[name][protocol] for name in names]


def load_scenes(scenes_dir: str | Path, split: str, benchmarks: Sequence[Benchmark]) -> dict[str, Dataset]:
    """Rows of a folder made by `agevlm data scenes`, by benchmark."""
    data = {}
    for b in benchmarks:
        rows = load_told(scenes_dir, split) if b.name in TEXT_ONLY else load_benchmark(scenes_dir, split, b.name)
        data[b.name] = prepare(b, rows, f"{scenes_dir}, split {split}")
    return data


def load_published(
    benchmarks: Sequence[Benchmark], places: Mapping[str, str], images: str | Path | None = None, strict: bool = False
) -> dict[str, Dataset]:
    """Rows by benchmark, each from its place: a file, a folder or a Hub id; without one from the Hub. `images`: folder
    of the pictures that rows name. `strict`: stop at an own question that cannot be asked."""
    data = {}
    for benchmark in benchmarks:
        place = places.get(benchmark.name)
        if benchmark.name in OWN and place is not None:
            data[benchmark.name] = load_own(place, images, strict)
        elif place is not None and Path(place).exists():
            data[benchmark.name] = load_local(benchmark, place, images)
        else:
            data[benchmark.name] = load_hub(benchmark, place)
    return data


def evaluate_scenes(
    model: Any,
    processor: Any,
    scenes_dir: str | Path,
    split: str,
    output_dir: str | Path,
    *,
    benchmarks: Sequence[str] = ("all",),
    protocol: str = "paper",
    **settings: Any,
) -> Metrics:
    """Evaluates one model on one split of scenes; see `evaluate`."""
    chosen = choose(benchmarks, protocol)
    data = load_scenes(scenes_dir, split, chosen)
    return evaluate(model, processor, chosen, data, output_dir, source={"data": "scenes", "split": split}, **settings)


def evaluate(
    model: Any,
    processor: Any,
    benchmarks: Sequence[Benchmark],
    data: Mapping[str, Dataset],
    output_dir: str | Path,
    *,
    source: Mapping[str, str],
    name: str | None = None,
    weights: str | None = None,
    judge: Judge | None = None,
    masked: Dataset | None = None,
    language: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Metrics:
    """Evaluates one model and writes `output_dir`.

    Args:
        model: a torch module with `generate`, `device` and `dtype`, taking `processor`'s inputs. Where it looks is
            measured if it has cross-attention maps (ours), on the rows that have a mask.
        benchmarks: none of them where looking is measured on `masked` alone.
        data: rows by benchmark.
        source: where the rows come from, for the record: `data` and `split`.
        name: of the model, for the record.
        weights: fingerprint of the files it was loaded from (`stored_fingerprint`), by which a card knows that the
            result is its own.
        judge: reads every output a second time.
        masked: more rows to measure looking on (`looking.load_masked`).
        language: place of a held text to measure the perplexity of (`language.read_held_text`).
        limit: first rows of each benchmark only.
        max_new_tokens: longest answer; None: the protocol's.
        strict: stop at a bad row instead of counting it as skipped.

    Returns:
        The content of `metrics.json`, see docs/evaluation.md, on every process.

    Raises:
        ValueError: missing data, a protocol that needs a judge, or a folder that holds another run.
    """
    output = Path(output_dir)
    data = {b.name: _limited(data[b.name], limit, b.name) for b in benchmarks}
    for benchmark in benchmarks:
        if benchmark.judged_only and judge is None:
            raise ValueError(
                f"{benchmark.name}: the protocol {benchmark.protocol!r} is scored by a judge alone; give one (--judge)"
            )
    held = None if language is None else read_held_text(language, processor)
    identity: dict[str, Any] = {
        "model": weights_digest(model),
        "images": digest(json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)),
        "limit": limit,
    }
    pictures = {name: content_digest(rows, PICTURES) for name, rows in data.items()}
    whole = {
        **identity,
        **source,
        "benchmarks": sorted(data),
        "protocol": benchmarks[0].protocol if benchmarks else PROTOCOLS[0],
        "max_new_tokens": max_new_tokens,
        "judge": judge.digest if judge is not None else None,
        "rows": {name: rows_digest(rows) for name, rows in data.items()},
        "masked": rows_digest(masked) if masked is not None else None,
        "pictures": pictures,
        "masked_pictures": content_digest(masked, PICTURES) if masked is not None else None,
        "language": held.stated if held is not None else None,
    }
    finished: Metrics | None = read_json(output / RESULT) if (output / RESULT).is_file() else None
    if finished is not None:
        there = {"format": finished.get("format"), **finished.get("identity", {})}
        check_same(output, there, {"format": FORMAT, **whole})
    PartialState().wait_for_everyone()
    if finished is not None:
        if weights is not None and finished.get("weights") != weights:  # of before, or the same weights stored anew
            finished["weights"] = weights
            if is_main():
                write_json(output / RESULT, finished)
        return finished

    looks = hasattr(model.config, "cross_attention_layers") and hasattr(processor, "message_span")
    if masked is not None and not looks:
        raise ValueError(f"{name or 'the model'} has no cross-attention maps: looking cannot be measured")
    layers = list(model.config.cross_attention_layers) if looks else []
    start, was_training = time.monotonic(), model.training
    settings: dict[str, Any] = {"batch_size": batch_size, "strict": strict, "progress": progress}
    answers: dict[str, Any] = {"max_new_tokens": max_new_tokens, "looks": looks}
    results: Metrics = {}
    pooled: list[Look] = []
    marked = 0
    model.eval()
    try:
        for benchmark in benchmarks:
            rows, folder = data[benchmark.name], output / benchmark.name
            answers["identity"] = {**identity, "pictures": pictures[benchmark.name]}
            predictions, records = generate_predictions(
                model, processor, benchmark, rows, folder, **answers, **settings
            )
            result, judged = score_predictions(benchmark, rows, predictions, judge, progress)
            if judge is not None and is_main():
                write_lines(folder / "judged.jsonl", judged)
            with_mask = len(marked_rows(rows)) if looks else 0
            grounding = summarize(records, with_mask, layers) if looks else {"n": 0, "skipped": 0}
            results[benchmark.name] = {**result, "grounding": grounding}
            pooled, marked = pooled + records, marked + with_mask
        metrics: Metrics = {
            "format": FORMAT,
            "model": name,
            "weights": weights,
            **source,
            "protocol": whole["protocol"],
            "judge": judge.name if judge is not None else None,
            "identity": whole,
            "benchmarks": results,
            "grounding": summarize(pooled, marked, layers),
        }
        if masked is not None:
            metrics["masked"] = measure_looking(model, processor, masked, **settings)[0]
        if held is not None:
            metrics["language"] = {**held.stated, **perplexity(model, processor.tokenizer, held)}
    finally:
        model.train(was_training)
    metrics["seconds"] = round(time.monotonic() - start, 1)
    metrics["versions"] = {package: version(package) for package in ("agevlm", "torch", "transformers")}
    if is_main():
        write_json(output / RESULT, metrics)
    PartialState().wait_for_everyone()
    return metrics


def stored_fingerprint(name: str, revision: str = "main", adapter: str | None = None) -> str | None:
    """`weights_fingerprint` of the files that a model was loaded from (with an adapter: of its files); None where they
    are no safetensors."""
    place, revision = (name, revision) if adapter is None else (adapter, "main")
    if not Path(place).is_dir():
        place = snapshot_download(place, revision=revision, allow_patterns="*.safetensors", local_files_only=True)
    return weights_fingerprint(place)


def _limited(rows: Dataset, limit: int | None, name: str) -> Dataset:
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"{name} has no rows; take more data or raise `limit`")
    return rows


def score_predictions(
    benchmark: Benchmark,
    rows: Dataset,
    predictions: Sequence[Prediction],
    judge: Judge | None = None,
    progress: bool = False,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Scores, intervals, baselines, protocol, number of skipped rows and the judged column; and the judge's lines.

    A pure function of the predictions (and the judge's replies): batch, processes and interruptions leave no trace.

    Raises:
        ValueError: every row was skipped.
    """
    usable, (lines,) = answered(rows, predictions)
    if not usable:
        raise ValueError(f"{benchmark.name}: none of {len(rows)} rows could be used; {predictions[0]['error']}")
    parsed = [line["parsed"] for line in lines]
    result = {
        **benchmark.score(usable, parsed),
        "intervals": benchmark.intervals(usable, parsed),
        "skipped": len(rows) - len(usable),
        "protocol": f"{benchmark.protocol}: {benchmark.rule}",
        "note": benchmark.note(usable),
        "shown": list(benchmark.shown or (benchmark.headline,)),
        "judged_only": benchmark.judged_only,
        "constants": benchmark.constants(usable),
    }
    if judge is None:
        return result, []
    judged = judge_rows(judge, benchmark, usable, [line["output"] for line in lines], progress)
    result["judged"] = score_judged(benchmark, usable, parsed, [line["label"] for line in judged])
    return result, judged


def answered(rows: Dataset, *predictions: Sequence[Prediction]) -> tuple[list[Row], list[list[Prediction]]]:
    """The rows that nobody skipped, and each model's predictions for them."""
    kept = [
        index
        for index, lines in enumerate(zip(*predictions, strict=True))
        if all(line["verdict"] != "skipped" for line in lines)
    ]
    asked = list(plain(rows))
    return [asked[index] for index in kept], [[lines[index] for index in kept] for lines in predictions]


def compare(benchmark: Benchmark, rows: Dataset, first: Sequence[Prediction], second: Sequence[Prediction]) -> Metrics:
    """Two models' predictions for the same rows: the paired bootstrap of every metric's difference (second - first)
    and McNemar's exact test on right answers. Rows that either skipped are left out."""
    usable, both = answered(rows, first, second)
    units = units_of([benchmark.unit(row) for row in usable])
    parsed = [[line["parsed"] for line in lines] for lines in both]
    one, other = (benchmark.all_measures(usable, answers) for answers in parsed)
    return {
        "n": len(usable),
        "metric": benchmark.headline,
        **paired_difference([one[benchmark.headline,]], [other[benchmark.headline,]], units),
        "mcnemar": mcnemar(benchmark.credits(usable, parsed[0]), benchmark.credits(usable, parsed[1])),
    }


def rows_digest(rows: Dataset) -> str:
    """A digest of everything in rows but their pictures."""
    return digest("\n".join(json.dumps(row, sort_keys=True, default=str) for row in plain(rows)))


def compare_folders(
    output: Path, names: Sequence[str], benchmarks: Sequence[Benchmark], data: Mapping[str, Dataset]
) -> list[dict[str, Any]]:
    """`compare` for every pair of models and every benchmark, from the predictions on disk."""
    lines = []
    for benchmark in benchmarks:
        if benchmark.judged_only:
            continue
        predictions = {name: read_lines(output / name / benchmark.name / PREDICTIONS) for name in names}
        rows = data[benchmark.name].select(range(len(predictions[names[0]])))  # fewer under a limit
        for first, second in combinations(names, 2):
            found = compare(benchmark, rows, predictions[first], predictions[second])
            lines.append({"benchmark": benchmark.name, "first": first, "second": second, **found})
    return lines


def parse_places(values: Sequence[str]) -> dict[str, str]:
    """`FILE` (own questions), `FOLDER` (for all benchmarks) and `NAME=PLACE` into places by benchmark.

    Raises:
        ValueError: an unknown name, or a file or folder that is not there.
    """
    places: dict[str, str] = {}
    for value in values:
        name, equals, place = value.partition("=")
        if Path(value).is_file():
            if places.keys() & OWN.keys():
                raise ValueError(f"--data {value}: a second file of own questions; call eval for each")
            places |= dict.fromkeys(OWN, value)
        elif Path(value).is_dir():
            places = {**dict.fromkeys((*TEXT_ONLY, *BENCHMARKS), value), **places}
        elif not equals:
            raise ValueError(
                f"--data {value}: no such file or folder; give a file of own questions, a folder of published "
                "ones, or NAME=PLACE for one benchmark"
            )
        elif name not in EVERY:
            raise ValueError(f"--data {value}: unknown benchmark {name}; use {', '.join(EVERY)}")
        else:
            places[name] = place
    return places


def run_verb(arguments: argparse.Namespace) -> None:
    """`agevlm eval`, with the arguments of `cli.py`."""
    names = unique_names(arguments.models)
    if arguments.adapter and len(names) > 1:
        raise ValueError("an adapter belongs to one model; call eval once per model")
    if arguments.scenes and arguments.data:
        raise ValueError("--scenes and --data are two places for the same rows; give one")
    asks = arguments.benchmarks or arguments.data or arguments.scenes or not (arguments.masks or arguments.language)
    places = parse_places(arguments.data)
    own = [name for name in OWN if name in places]
    usual = [*own, *list(BENCHMARKS) * (len(places) > len(own))] if own else ["all"]
    benchmarks = choose(arguments.benchmarks or usual, arguments.protocol) if asks else []
    output = Path(arguments.output)
    if arguments.scenes:
        data = load_scenes(arguments.scenes, arguments.split, benchmarks)
        source = {"data": "scenes", "split": arguments.split}
    else:
        data = load_published(benchmarks, places, arguments.images, arguments.strict)
        source = {"data": " ".join(arguments.data) or "Hub", "split": "test"}
    if arguments.rows and not arguments.masks:
        raise ValueError("--rows are those of --masks; give the masks too")
    masked = load_masked(arguments.masks, arguments.rows) if arguments.masks else None
    judge = Judge(arguments.judge, output / "judge", arguments.batch_size) if arguments.judge else None
    results, answers, errors = {}, {}, {}
    asked = next((benchmark for benchmark in benchmarks if benchmark.name in OWN), None)
    for benchmark in benchmarks:
        if is_main() and (note := benchmark.note(plain(data[benchmark.name]))):
            print(f"{benchmark.name}: {note}")
    loading = {name: getattr(arguments, name) for name in ("revision", "adapter", "four_bit", "trust_remote_code")}
    passed = ("language", "limit", "batch_size", "max_new_tokens", "strict")
    settings = {name: getattr(arguments, name) for name in passed}
    for name, path in zip(names, arguments.models, strict=True):
        model, processor = load(path, device_map=current_device(), **loading)
        with locked(output / name, wait=False) if is_main() else nullcontext():
            results[name] = evaluate(
                model,
                processor,
                benchmarks,
                data,
                output / name,
                source=source,
                name=name,
                weights=stored_fingerprint(path, arguments.revision, arguments.adapter),
                judge=judge,
                masked=masked,
                **settings,
            )
            if asked is not None and is_main():
                answers[name] = read_lines(output / name / asked.name / PREDICTIONS)
                errors[name] = draw_errors(model, processor, asked, data[asked.name], answers[name])
    if not is_main():
        return
    comparisons = compare_folders(output, names, benchmarks, data) if len(names) > 1 else []
    if comparisons:
        write_json(output / "comparison.json", comparisons)
    write_text(output / "results.md", markdown_page(results, comparisons))
    write_text(output / "results.html", html_page(results, comparisons, answers, errors))
    Console(markup=False).print(summary_table(results))
    written(output, f"agevlm demo {shlex.join(arguments.models[:2])}")


if __name__ == "__main__":  # as it was called with `accelerate launch -m`, for one more release
    from agevlm.arguments import note_old
    from agevlm.evaluation import cli

    note_old("agevlm.evaluation.run", "`-m agevlm eval`")
    cli.evaluate()
