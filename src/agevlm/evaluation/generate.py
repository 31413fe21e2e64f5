"""Batched greedy answers to benchmark rows and where the model looks meanwhile, kept row by row and resumed.

A line of `predictions.jsonl` is {id, prompt, output, parsed, verdict, error}; verdict is correct, wrong, unparsed or
skipped. A line of `grounding.jsonl` is a row's look (`looking.py`), of rows with a mask. Lines are appended batch by
batch and synced; with several processes each appends to files of its own, and at the end one file holds all lines in
the order of the rows. A run that was cut off goes on behind its whole lines, with any number of processes; skipped
rows, and rows with a mask that have no look, are tried again. The file must hold answers to the same questions, and
`run.json` beside it says of which model and settings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from agevlm.models import encode, render
from agevlm.progress import Bar
from agevlm.store import Journal, claim, read_lines, write_lines

from .benchmark import Benchmark, verdict
from .inputs import each_picture_once, encode_questions, open_rows, picture_key, without_pictures
from .looking import Look, look_records, looking, marked_rows
from .processes import is_main, my_share


PREDICTIONS, LOOKS, RUN = "predictions.jsonl", "grounding.jsonl", "run.json"
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
    looks: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> tuple[list[Prediction], list[Look]]:
    """Answers `rows` and returns one prediction per row and the looks, in their order, on every process.

    Args:
        rows: pictures undecoded (`datasets.Image(decode=False)`) or decoded; null where a row is text alone.
        folder: receives `predictions.jsonl`, `grounding.jsonl` and `run.json`.
        identity: what the answers depend on (model, settings); compared when the folder is used again.
        max_new_tokens: None: the protocol's.
        looks: measure where the model looks on rows with a mask; it must have cross-attention maps.
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
    looked = {line["id"]: line for path in _files(folder, LOOKS) for line in read_lines(path)} if looks else {}
    PartialState().wait_for_everyone()
    if is_main() and folder.joinpath(PREDICTIONS).exists():
        _consolidate(folder, list(done.values()), list(looked.values()))
    PartialState().wait_for_everyone()
    marked = set(marked_rows(rows)) if looks else set()
    pending = my_share(
        [
            index
            for index, row_id in enumerate(rows["id"])
            if row_id not in done or (index in marked and row_id not in looked)
        ]
    )
    bar = Bar(total=len(pending), desc=benchmark.name, unit="row", disable=not progress or not is_main())
    new: list[tuple[list[Prediction], list[Look]]] = []
    with bar, Journal(_own(folder, PREDICTIONS)) as answers, Journal(_own(folder, LOOKS)) as attention:
        for start in range(0, len(pending), batch_size):
            chosen = rows.select(pending[start : start + batch_size])
            lines, records = _answer(model, processor, benchmark, chosen, limit, looks, strict)
            attention.append(records)
            answers.append(lines)
            new.append((lines, records))
            bar.update(len(lines))
    for lines, records in gather_object(new):
        done.update((line["id"], line) for line in lines)
        looked.update((record["id"], record) for record in records)
    predictions = [done[row_id] for row_id in prompts]
    in_order = [looked[row_id] for row_id in prompts if row_id in looked]
    PartialState().wait_for_everyone()
    if is_main():
        _consolidate(folder, predictions, in_order)
    return predictions, in_order


def _answer(
    model: Any, processor: Any, benchmark: Benchmark, rows: Dataset, limit: int, looks: bool, strict: bool
) -> tuple[list[Prediction], list[Look]]:
    questions, bad = open_rows(processor, benchmark, rows, with_masks=looks, strict=strict)
    asked = {row["id"]: benchmark.prompt(row) for row in without_pictures(rows)}
    lines = [_line(row_id, asked[row_id], error=error) for row_id, error in bad.items()]
    if not questions:
        return lines, []
    batch, query, cells = encode_questions(model, processor, questions)
    keys = [picture_key(question.row) for question in questions]
    with each_picture_once(model, keys), looking(model, query) as maps:
        outputs = _generate(model, processor, batch, limit)
    for question, output in zip(questions, outputs, strict=True):
        row = question.row
        parsed = benchmark.parse(row, output)
        lines.append(_line(row["id"], asked[row["id"]], output, parsed, verdict(benchmark, row, parsed)))
    if cells is None:
        return lines, []
    seen, grid = batch["visual_token_mask"], processor.image_processor.grid
    return lines, look_records(questions, maps[0], cells, seen, grid, strict)


def _line(
    row_id: str,
    prompt: str,
    output: str | None = None,
    parsed: str | None = None,
    verdict: str = "skipped",
    error: str | None = None,
) -> Prediction:
    return {"id": row_id, "prompt": prompt, "output": output, "parsed": parsed, "verdict": verdict, "error": error}


def answer_batch(
    model: Any, processor: Any, images: Sequence, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy answers, special tokens removed. `images`: None where a row has none."""
    texts = [render(processor, prompt, image is not None) for prompt, image in zip(prompts, images, strict=True)]
    return _generate(model, processor, encode(model, processor, images, texts), max_new_tokens)


@torch.inference_mode()
def _generate(model: Any, processor: Any, batch: Mapping[str, torch.Tensor], max_new_tokens: int) -> list[str]:
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


# ---- Files ----


def _own(folder: Path, name: str) -> Path:
    """This process's file of lines."""
    return folder / (name if is_main() else f"{Path(name).stem}.{PartialState().process_index}.jsonl")


def _files(folder: Path, name: str) -> list[Path]:
    """The files of all processes that are there, the first one's in front."""
    return [path for path in (folder / name, *sorted(folder.glob(f"{Path(name).stem}.*.jsonl"))) if path.is_file()]


def _consolidate(folder: Path, predictions: Sequence[Prediction], looks: Sequence[Look]) -> None:
    """All lines into one file each; the other processes' files go."""
    for name, lines in ((PREDICTIONS, predictions), (LOOKS, looks)):
        write_lines(folder / name, lines)
        for path in _files(folder, name)[1:]:
            path.unlink()


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
    for path in _files(folder, PREDICTIONS):
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
