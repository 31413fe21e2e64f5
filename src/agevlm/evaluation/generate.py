"""Batched greedy answers to benchmark rows, kept row by row in `predictions.jsonl` and resumed from there.

A line is {id, prompt, output, parsed, verdict, error}; verdict is correct, wrong, unparsed or skipped. Lines are
appended batch by batch and synced; with several processes each appends to a file of its own, and at the end one file
holds all lines in the order of the rows. A run that was cut off goes on behind its whole lines, with any number of
processes; skipped rows are tried again. The file must hold answers to the same questions, and `run.json` beside it
says of which model and settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm

from agevlm.models import encode, render
from agevlm.store import Journal, claim, read_lines, write_lines

from .benchmark import Benchmark, Row, verdict
from .inputs import RowError, each_picture_once, picture_key, row_image
from .processes import is_main, my_share


PREDICTIONS = "predictions.jsonl"
RUN = "run.json"
Prediction = dict[str, Any]


def generate_predictions(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    rows: Dataset,
    folder: str | Path,
    *,
    identity: Mapping[str, Any],
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> list[Prediction]:
    """Answers `rows` and returns one prediction per row, in their order, on every process.

    Args:
        rows: pictures undecoded (`datasets.Image(decode=False)`) or decoded; null where a row is text alone.
        folder: receives `predictions.jsonl` and `run.json`.
        identity: what the answers depend on (model, settings); compared when the folder is used again.
        max_new_tokens: None: the protocol's.
        strict: a bad row raises ValueError. Otherwise it is recorded with its error and skipped.

    Raises:
        ValueError: the folder holds answers to other questions or of another model; two rows share an id.
    """
    folder, limit = Path(folder), max_new_tokens or benchmark.max_new_tokens
    prompts = {row["id"]: benchmark.prompt(row) for row in without_pictures(rows)}
    if len(prompts) != len(rows):
        raise ValueError(f"{benchmark.name}: {len(rows)} rows have {len(prompts)} different ids; make ids unique")
    settings = {"protocol": benchmark.protocol, "rule": benchmark.rule, "max_new_tokens": limit}
    _claim(folder, {**identity, **settings})
    PartialState().wait_for_everyone()
    done = {line["id"]: line for line in read_predictions(folder, prompts)}
    PartialState().wait_for_everyone()
    if is_main() and folder.joinpath(PREDICTIONS).exists():
        _consolidate(folder, list(done.values()))
    PartialState().wait_for_everyone()
    pending = my_share([index for index, row_id in enumerate(rows["id"]) if row_id not in done])
    own = folder / (PREDICTIONS if is_main() else f"predictions.{PartialState().process_index}.jsonl")
    new: list[Prediction] = []
    bar = tqdm(total=len(pending), desc=benchmark.name, unit="row", disable=not progress or not is_main())
    with bar, Journal(own) as journal:
        for start in range(0, len(pending), batch_size):
            chosen = rows.select(pending[start : start + batch_size])
            lines = _answer(model, processor, benchmark, chosen, limit, strict)
            journal.append(lines)
            new += lines
            bar.update(len(lines))
    done.update((line["id"], line) for line in gather_object(new))
    predictions = [done[row_id] for row_id in prompts]
    PartialState().wait_for_everyone()
    if is_main():
        _consolidate(folder, predictions)
    return predictions


def _consolidate(folder: Path, predictions: Sequence[Prediction]) -> None:
    """All lines into one file; the other processes' files go."""
    write_lines(folder / PREDICTIONS, predictions)
    for path in _parts(folder):
        path.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("predictions.*.jsonl"))


def without_pictures(rows: Dataset) -> Iterator[Row]:
    """The rows without their `image` and `mask` columns: scoring needs neither."""
    return iter(rows.remove_columns([name for name in ("image", "mask") if name in rows.column_names]))


def _answer(
    model: Any, processor: Any, benchmark: Benchmark, rows: Dataset, max_new_tokens: int, strict: bool
) -> list[Prediction]:
    usable, images, lines = [], [], []
    for row in rows:
        try:
            images.append(row_image(row))
            usable.append(row)
        except RowError as error:
            if strict:
                raise
            lines.append(_line(row["id"], benchmark.prompt(row), error=str(error)))
    if usable:
        with each_picture_once(model, [picture_key(row) for row in usable]):
            outputs = answer_batch(model, processor, images, [benchmark.prompt(row) for row in usable], max_new_tokens)
        for row, output in zip(usable, outputs, strict=True):
            parsed = benchmark.parse(row, output)
            lines.append(_line(row["id"], benchmark.prompt(row), output, parsed, verdict(benchmark, row, parsed)))
    return lines


def _line(
    row_id: str,
    prompt: str,
    output: str | None = None,
    parsed: str | None = None,
    verdict: str = "skipped",
    error: str | None = None,
) -> Prediction:
    return {"id": row_id, "prompt": prompt, "output": output, "parsed": parsed, "verdict": verdict, "error": error}


@torch.inference_mode()
def answer_batch(
    model: Any, processor: Any, images: Sequence, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers, special tokens removed. `images`: None where a row has none."""
    texts = [render(processor, prompt, image is not None) for prompt, image in zip(prompts, images, strict=True)]
    batch = encode(model, processor, images, texts)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Records what the answers in `folder` depend on, or compares it with what was recorded."""
    if (folder / PREDICTIONS).exists() and not (folder / RUN).is_file():
        raise ValueError(f"{folder} has {PREDICTIONS} but no {RUN}; delete the folder or choose another one")
    claim(folder / RUN, identity)


def read_predictions(folder: Path, prompts: Mapping[str, str]) -> list[Prediction]:
    """The finished lines of earlier runs in `folder`, without cut-off last lines and skipped rows.

    Raises:
        ValueError: a line that is no prediction, or one for a question that is not among `prompts`.
    """
    kept: dict[str, Prediction] = {}
    for path in (folder / PREDICTIONS, *_parts(folder)):
        if not path.exists():
            continue
        for number, prediction in enumerate(read_lines(path), start=1):
            try:
                row_id, prompt, outcome = prediction["id"], prediction["prompt"], prediction["verdict"]
            except (TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is damaged: {prediction!r:.80}; delete the file") from error
            if prompts.get(row_id) != prompt:
                raise ValueError(
                    f"{path}, line {number} answers {prompt!r} (id {row_id!r}), which is not asked here; choose "
                    "another folder or delete the file"
                )
            if outcome != "skipped":
                kept[row_id] = prediction
    return list(kept.values())
