"""Evaluates checkpoints on the benchmarks of a scenes folder: answers, scores, where the model looked, and baselines.

    agevlm eval MODEL... --scenes DIR --split composition --output DIR

Each model's folder receives `metrics.json` and, per benchmark, `predictions.jsonl` (raw outputs), `run.json` and
`grounding.jsonl`. The same call again goes on where it stopped, or returns at once.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from rich.console import Console
from rich.table import Table

from agevlm.data.scenes import load_benchmark
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor

from . import cvbench, hallusionbench, ocrbench, pope, realworldqa
from .benchmark import Metrics, check_fields
from .generate import generate_predictions, without_pictures, write_json
from .grounding import METRICS as GROUNDING_METRICS
from .grounding import measure_grounding, summarise


BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module for module in (pope, cvbench, ocrbench, hallusionbench, realworldqa)
}
RESULT = "metrics.json"


def evaluate_scenes(
    model: Any,
    processor: Any,
    scenes_dir: str | Path,
    split: str,
    output_dir: str | Path,
    *,
    benchmarks: Sequence[str] = tuple(BENCHMARKS),
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    strict: bool = False,
    progress: bool = True,
) -> Metrics:
    """Evaluates one model on one split and writes `output_dir`.

    Args:
        model: a torch module with `generate`, `base_model`, `device` and `dtype`, taking `processor`'s inputs.
        benchmarks: names out of `BENCHMARKS`.
        limit: first rows of each benchmark only.
        strict: stop at a bad row instead of counting it as skipped.

    Returns:
        {split, identity, benchmarks, grounding, seconds, versions}. `benchmarks[name]` holds the scores (percentages,
        see the benchmark's file), `skipped`, `protocol`, `constants` (scores of answers given without looking) and
        `grounding`; `grounding` at the top pools the rows of all benchmarks (see `grounding.py`; shares in [0, 1]).

    Raises:
        ValueError: unknown benchmark or split, missing data, or a folder that holds another run.
    """
    unknown = [name for name in benchmarks if name not in BENCHMARKS]
    if unknown or not benchmarks:
        raise ValueError(f"unknown benchmark {', '.join(unknown) or '(none given)'}; use {', '.join(BENCHMARKS)}")
    output = Path(output_dir)
    identity: dict[str, Any] = {
        "model": weights_digest(model),
        "images": _digest(json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str).encode()),
        "limit": limit,
    }
    whole = {**identity, "split": split, "benchmarks": sorted(benchmarks), "max_new_tokens": max_new_tokens}
    data = {name: _load(scenes_dir, split, name, limit) for name in benchmarks}
    whole["rows"] = {name: _digest("\n".join(rows["id"]).encode()) for name, rows in data.items()}
    finished = _read_finished(output / RESULT, whole)
    if finished is not None:
        return finished

    start, was_training = time.monotonic(), model.training
    model.eval()
    results, pooled = {}, []
    for name, rows in data.items():
        benchmark, folder = BENCHMARKS[name], output / name
        settings: dict[str, Any] = {"batch_size": batch_size, "strict": strict, "progress": progress}
        predictions = generate_predictions(
            model, processor, benchmark, rows, folder, identity=identity, max_new_tokens=max_new_tokens, **settings
        )
        grounding, records = measure_grounding(model, processor, benchmark, rows, **settings)
        _write_lines(folder / "grounding.jsonl", records)
        results[name] = {**score_predictions(benchmark, rows, predictions), "grounding": grounding}
        pooled += records
    model.train(was_training)
    skipped = sum(result["grounding"]["skipped"] for result in results.values())
    metrics = {
        "split": split,
        "identity": whole,
        "benchmarks": results,
        "grounding": {**summarise(pooled), "skipped": skipped, "layers": list(model.config.cross_attention_layers)},
        "seconds": round(time.monotonic() - start, 1),
        "versions": {package: version(package) for package in ("agevlm", "torch", "transformers")},
    }
    write_json(output / RESULT, metrics)
    return metrics


def score_predictions(benchmark: Any, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> Metrics:
    """Scores, baselines, protocol and the number of skipped rows.

    Raises:
        ValueError: every row was skipped.
    """
    pairs = [
        (row, benchmark.parse(row, prediction["output"]))
        for row, prediction in zip(without_pictures(rows), predictions, strict=True)
        if prediction["verdict"] != "skipped"
    ]
    if not pairs:
        raise ValueError(f"{benchmark.NAME}: none of {len(rows)} rows could be used; its predictions name the errors")
    usable, parsed = zip(*pairs, strict=True)
    return {
        **benchmark.score(usable, parsed),
        "skipped": len(rows) - len(usable),
        "protocol": benchmark.PROTOCOL,
        "constants": benchmark.constants(usable),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of up to 64 evenly spaced values of every parameter: tells checkpoints apart in milliseconds."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // 64)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _load(scenes_dir: str | Path, split: str, name: str, limit: int | None) -> Dataset:
    """Rows with undecoded pictures, so that a broken one fails where it is used and nowhere else."""
    rows = load_benchmark(scenes_dir, split, name)
    check_fields(BENCHMARKS[name], rows.column_names, f"{scenes_dir}, split {split}")  # type: ignore[arg-type]
    for column in ("image", "mask"):
        if column in rows.column_names:
            rows = rows.cast_column(column, ImageFeature(decode=False))
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise ValueError(f"{scenes_dir}: {name} in split {split} has no rows; build more or raise `limit`")
    return rows


def _read_finished(path: Path, identity: dict) -> Metrics | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("identity") == json.loads(json.dumps(identity)):
        return found
    raise ValueError(f"{path} belongs to another model, split or setting; choose another folder or delete it")


def _write_lines(path: Path, records: Sequence[dict]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


def check_checkpoint(name: str, revision: str = "main") -> None:
    """transformers only warns of another model's checkpoint, and goes on with weights drawn at random.

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    try:
        model_type = AgeVlmConfig.get_config_dict(name, revision=revision)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"{name} is no AGE-VLM checkpoint: {error}; give its folder or Hub id") from error
    if model_type != AgeVlmConfig.model_type:
        raise ValueError(
            f"{name} is no AGE-VLM checkpoint: its model type is {model_type!r}, not {AgeVlmConfig.model_type!r}"
        )


def load_checkpoint(name: str) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model (in its stored dtype, on the accelerator if there is one) and processor.

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    check_checkpoint(name)
    try:
        device = torch.accelerator.current_accelerator(check_available=True)
        model = AgeVlmForConditionalGeneration.from_pretrained(name, dtype="auto", device_map=device)
        processor = AgeVlmProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"{name} is no AGE-VLM checkpoint: {error}; give its folder or Hub id") from error
    return model.eval(), processor


def summary_table(results: dict[str, Metrics]) -> Table:
    """One line per number, one column per model, and what the same number is without looking."""
    first = next(iter(results.values()))
    table = Table(title=f"split {first['split']}")
    table.add_column("")
    for model in results:
        table.add_column(model, justify="right")
    table.add_column("without looking")
    for name, result in first["benchmarks"].items():
        shown = ["f1", "accuracy", "yes_ratio"] if name == "pope" else [result["headline"]]
        for metric in shown:
            values = [f"{metrics['benchmarks'][name][metric]:.1f}" for metrics in results.values()]
            best = max(result["constants"], key=lambda constant: result["constants"][constant][metric])
            reference = f"{result['constants'][best][metric]:.1f} ({best})" if metric != "yes_ratio" else ""
            table.add_row(f"{name} {metric}", *values, reference)
        unparsed = [f"{metrics['benchmarks'][name]['unparsed']:.1f}" for metrics in results.values()]
        table.add_row(f"{name} unparsed %", *unparsed, "")
    for metric in GROUNDING_METRICS:
        if first["grounding"]["n"]:
            values = [f"{metrics['grounding'][metric]['mean']:.3f}" for metrics in results.values()]
            table.add_row(metric.replace("_", " "), *values, f"{first['grounding']['uniform'][metric]:.3f} (uniform)")
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="agevlm eval", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub id of a checkpoint")
    parser.add_argument("--scenes", required=True, metavar="DIR", help="folder made by `agevlm data scenes`")
    parser.add_argument("--split", default="composition", help="composition, name or style (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="DIR", help="one folder per model is made in it")
    known = list(BENCHMARKS)
    parser.add_argument("--benchmarks", nargs="+", default=known, metavar="NAME", help=f"out of {', '.join(known)}")
    parser.add_argument("--limit", type=int, help="first rows of each benchmark only")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--strict", action="store_true", help="stop at a bad row instead of skipping it")
    arguments = parser.parse_args(argv)
    names = [Path(model).resolve().name for model in arguments.models]
    if len(set(names)) != len(names):
        raise ValueError(f"two models are called the same ({', '.join(names)}); rename a folder or call eval twice")
    results = {}
    for name, path in zip(names, arguments.models, strict=True):
        model, processor = load_checkpoint(path)
        results[name] = evaluate_scenes(
            model,
            processor,
            arguments.scenes,
            arguments.split,
            Path(arguments.output) / name,
            benchmarks=arguments.benchmarks,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            strict=arguments.strict,
        )
    Console().print(summary_table(results))
    print(f"written to {arguments.output}")
