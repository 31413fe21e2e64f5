"""The data doctor: what is wrong with a training set, before it costs time on a GPU.

Every row is read as the conversion reads it (`data/published/convert.py`), so the doctor's count of good rows is the
number of rows that a conversion writes. Beyond what a single row can show it finds repeated ids, rows and pictures,
rows that are too long for a checkpoint's tokenizer, and pictures that evaluation sets hold as well.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from agevlm.data.duplicates import equal_groups, hash64, save_hashes
from agevlm.data.parallel import run_jobs
from agevlm.data.rows import IMAGE_PLACEHOLDER
from agevlm.store import new_folder, read_lines, write_json

from .defaults import MAX_LENGTH
from .json_records import Chunk
from .overlap import EvaluationPictures, read_evaluation_pictures
from .records import DROPPED, REMARKED, REPAIRED, BadRow, finding, read_record
from .sources import Source, draft_hashes, open_source, read_pictures


_CHUNK, _EXAMPLES = 1_000, 5
# What no single row shows. The row would be used:
WARNED = {
    "too_long": "more tokens than max_length: the end is cut off",
    "image_behind_cut": "a picture's placeholder behind max_length: training leaves the row out",
    "evaluation_same": "a picture that is a file of an evaluation set",
    "evaluation_similar": "a picture that looks like one of an evaluation set",
}
SHARED = {"duplicate_picture": "a picture that an earlier row has"}
SEVERITY = {
    **dict.fromkeys(DROPPED, "dropped"), **dict.fromkeys(WARNED, "problem"),
    **dict.fromkeys(REPAIRED, "repaired"), **dict.fromkeys({**REMARKED, **SHARED}, "remark"),
}  # fmt: skip
MEANING = {**DROPPED, **WARNED, **REPAIRED, **REMARKED, **SHARED}


def check(
    source: str | Path,
    *,
    images: Sequence[str | Path] | None = None,
    against: Sequence[str | Path] = (),
    checkpoint: str | Path | None = None,
    max_length: int = MAX_LENGTH,
    workers: int = 1,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Examines a data set; changes nothing.

    Args:
        source, images: as `convert` takes them (`published.open_source`).
        against: folders of evaluation sets, as pictures or Parquet files.
        checkpoint: folder or repository whose tokenizer and chat template count tokens; None leaves lengths out.
        max_length: tokens that a row may have.
        workers: processes; with more than one, a script must guard its main part (`__main__`).
        limit: examine the first rows only.
        out: new folder for report.json and rows.jsonl, which lists every finding but text_only and multi_image.

    Returns:
        {rows_read, rows_good, pictures, problems, findings: {kind: {severity, rows, meaning, examples}}, sources,
        tokens, evaluation_pictures}. `problems` counts findings of the severities "dropped" and "problem".

    Raises:
        ValueError: no source, checkpoint or evaluation set, or `out` exists.
    """
    if out is not None and Path(out).exists():
        raise ValueError(f"{out} exists; choose another folder for the report")
    tokenizer = _tokenizer(checkpoint)
    with tempfile.TemporaryDirectory(prefix="agevlm-check-") as folder:
        work = Path(folder)
        opened = open_source(source, images, work)
        evaluation = read_evaluation_pictures(against, progress) if against else None
        chunks = opened.chunks(_CHUNK, limit)
        state = (opened, work, tokenizer, max_length, evaluation)
        counts: Counter[str] = Counter()
        sources: dict[str, Counter[str]] = {}
        for result in run_jobs(_examine, chunks, state, workers, "rows", progress):
            counts.update(result["counts"])
            for name, values in result["sources"].items():
                sources.setdefault(name, Counter()).update(values)
        counts.update(_write_repeated(work, chunks))
        examples = _examples(work)
        report = {
            "source": opened.name,
            "rows_read": sum(chunk.count for chunk in chunks),
            "rows_good": counts["good"] - counts["duplicate_row"],
            "pictures": counts["pictures"],
            "problems": sum(counts[kind] for kind in (*DROPPED, *WARNED)),
            "findings": {
                kind: {"severity": SEVERITY[kind], "rows": counts[kind], "meaning": MEANING[kind],
                       "examples": examples.get(kind, [])}
                for kind in MEANING if counts[kind]
            },
            "sources": {name: dict(sorted(values.items())) for name, values in sorted(sources.items())},
            "tokens": _lengths(work, chunks, checkpoint, max_length),
            "evaluation_pictures": None if evaluation is None else
            {"files": len(evaluation.files), "unreadable": evaluation.unreadable},
        }  # fmt: skip
        if out is not None:
            _write(Path(out), report, work)
    return report


def _tokenizer(checkpoint: str | Path | None) -> PreTrainedTokenizerFast | None:
    if checkpoint is None:
        return None
    from agevlm.models import TOKENIZER, reading

    with reading(checkpoint, TOKENIZER):
        # Not AutoTokenizer: it would ask for the checkpoint's code, which counting does not need.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
        if tokenizer.chat_template is None:
            raise ValueError("it has no chat template; give a checkpoint of AGE-VLM")
        tokenizer.apply_chat_template([{"role": "user", "content": IMAGE_PLACEHOLDER}], tokenize=False)
    return tokenizer


# ---- In a worker ----

State = tuple[Source, Path, PreTrainedTokenizerFast | None, int, EvaluationPictures | None]


def _examine(state: State, chunk: Chunk) -> dict[str, Any]:
    """Counts of a chunk. Findings, hashes and lengths of its rows go to files."""
    source, work, tokenizer, max_length, evaluation = state
    counts: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    ids, pictures = [], []
    lengths: list[int] = []
    with _file(work, "findings", chunk, "jsonl").open("w", encoding="utf-8") as findings:
        for position, record in source.records(chunk):
            draft, row, notes = None, None, []
            try:
                draft = read_record(record, position)
                row = read_pictures(draft, source.store)
                notes = row.notes + _length_notes(draft.messages, tokenizer, max_length, lengths)
                for image, picture in zip(row.images, row.pictures, strict=True):
                    pictures.append((hash64(image["bytes"]), position))
                    found = evaluation.find(image["bytes"], picture) if evaluation else None
                    notes += [(found[0], f"{image['path']} is {found[1]}")] if found else []
            except BadRow as error:
                notes = [(error.kind, error.detail)]
                sources.setdefault(error.source or "unknown", Counter())["dropped"] += 1
            if draft is not None:
                ids.append((*draft_hashes(draft), position, row is not None))
            if draft is not None and row is not None:
                counts.update({"good": 1, "pictures": len(row.images)})
                sources.setdefault(draft.source, Counter())["rows"] += 1
            counts.update({kind for kind, _ in notes})
            for kind, detail in notes:
                _note(findings, position, draft.id if draft else None, kind, detail)
    save_hashes(_file(work, "ids", chunk), np.array(ids, dtype=object).reshape(-1, 4))
    save_hashes(_file(work, "pictures", chunk), np.array(pictures, dtype=object).reshape(-1, 2))
    np.save(_file(work, "lengths", chunk), np.array(lengths, dtype=np.uint32), allow_pickle=False)
    return {"counts": counts, "sources": sources}


def _length_notes(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast | None, max_length: int, lengths: list[int]
) -> list[tuple[str, str]]:
    if tokenizer is None:
        return []
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    lengths.append(len(ids))
    if len(ids) <= max_length:
        return []
    notes = [("too_long", f"{len(ids)} tokens")]
    cut = ids[max_length:].count(tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER))
    return notes + ([("image_behind_cut", f"{cut} behind the first {max_length} tokens")] if cut else [])


def _note(file: Any, position: int, row_id: str | None, kind: str, detail: str) -> None:
    file.write(json.dumps(finding(position, row_id, kind, detail), ensure_ascii=False) + "\n")


# ---- What no single row shows ----


def _file(work: Path, what: str, chunk: Chunk, suffix: str = "npy") -> Path:
    return work / f"{what}-{chunk.index:06d}.{suffix}"


def _write_repeated(work: Path, chunks: list[Chunk]) -> Counter[str]:
    """Adds findings about good rows that repeat an id, a row or a picture of an earlier one; their numbers by kind."""
    counts: Counter[str] = Counter()
    with (work / "findings-repeated.jsonl").open("w", encoding="utf-8") as findings:
        for group in equal_groups([_file(work, "ids", chunk) for chunk in chunks]):
            first, contents = int(group[0, 2]), {int(group[0, 1])}
            for _, content, position, good in group[1:].tolist():
                kind = "duplicate_row" if content in contents else "duplicate_id"
                contents.add(content)
                if good:
                    _note(findings, position, None, kind, f"like row {first}")
                    counts[kind] += 1
        for group in equal_groups([_file(work, "pictures", chunk) for chunk in chunks]):
            first = int(group[0, 1])
            for position in sorted(set(group[:, 1].tolist()) - {first}):
                _note(findings, position, None, "duplicate_picture", f"like row {first}")
                counts["duplicate_picture"] += 1
    return counts


def _examples(work: Path) -> dict[str, list[dict]]:
    """The first findings of every kind."""
    examples: dict[str, list[dict]] = {}
    for path in sorted(work.glob("findings-*.jsonl")):
        for found in read_lines(path):
            if len(of_kind := examples.setdefault(found.pop("kind"), [])) < _EXAMPLES:
                of_kind.append(found)
    return examples


def _lengths(work: Path, chunks: list[Chunk], checkpoint: str | Path | None, max_length: int) -> dict | None:
    lengths = np.concatenate([np.zeros(0, np.uint32), *(np.load(_file(work, "lengths", c)) for c in chunks)])
    if checkpoint is None or not lengths.size:
        return None
    middle, most, longest = np.percentile(lengths, [50, 95, 100]).round().astype(int).tolist()
    return {"checkpoint": str(checkpoint), "max_length": max_length, "mean": round(float(lengths.mean()), 1),
            "median": middle, "percentile_95": most, "longest": longest}  # fmt: skip


# ---- The report ----


def _write(out: Path, report: dict[str, Any], work: Path) -> None:
    with new_folder(out) as partial:
        write_json(partial / "report.json", report)
        with (partial / "rows.jsonl").open("w", encoding="utf-8") as file:
            for path in sorted(work.glob("findings-*.jsonl")):
                with path.open(encoding="utf-8") as findings:
                    file.writelines(line for line in findings if '"kind": "text_only"' not in line
                                    and '"kind": "multi_image"' not in line)  # fmt: skip


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table."""
    rows, pictures = f"{report['rows_good']:,} of {report['rows_read']:,} rows", f"{report['pictures']:,} pictures"
    title = Text(f"{report['source']}: {rows} are good, with {pictures}")
    table = Table("", "finding", "rows", "meaning", "for example", title=title)
    for severity, style in (("dropped", "red"), ("problem", "yellow"), ("repaired", "cyan"), ("remark", "dim")):
        of_kind = [(kind, found) for kind, found in report["findings"].items() if found["severity"] == severity]
        for kind, found in sorted(of_kind, key=lambda item: -item[1]["rows"]):
            example = found["examples"][0] if found["examples"] else {"row": "", "detail": ""}
            shown = f"row {example['row']}: {example['detail']}"[:60]
            cells = (kind, f"{found['rows']:,}", found["meaning"], shown)
            table.add_row(Text(severity, style), *map(Text, cells))
    console.print(table if table.rows else title)
    tokens = report["tokens"]
    if tokens is None:
        console.print("Lengths were not measured: give --checkpoint.")
    else:
        console.print(
            f"Tokens: median {tokens['median']}, 95 % up to {tokens['percentile_95']}, longest {tokens['longest']} "
            f"(max_length {tokens['max_length']})."
        )
    if report["evaluation_pictures"] is None:
        console.print("No evaluation set was compared: give --against FOLDER.")
