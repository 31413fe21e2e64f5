"""Rows of a benchmark as a model's inputs, shared by answering and looking: decoded once, encoded once.

A picture that several rows of a batch show is decoded once and passes the vision tower of a model of ours once.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from agevlm.data.rows import open_row
from agevlm.images import open_image, open_mask
from agevlm.models import check_messages, control_tokens, encode, messages, render
from agevlm.processing.processing_agevlm import take_marks

from .benchmark import Row


PICTURES = ("image", "mask", "images", "guidance")  # columns; the last two of rows with masks by phrase
UNUSABLE = "unusable"  # column of the reason for which a row of own questions cannot be asked


@dataclass(frozen=True)
class Question:
    """A row with its picture, None where there is none, its text in the model's chat format, and for each phrase that
    says what to look at its place (start, end) in the text and its mask."""

    row: Row
    image: Image.Image | None
    text: str
    phrases: list[tuple[tuple[int, int], Image.Image]]


def without_pictures(rows: Dataset) -> Iterator[Row]:
    """The rows without their pictures and masks: scoring needs neither."""
    return iter(rows.remove_columns([name for name in PICTURES if name in rows.column_names]))


def picture_key(row: Row) -> Any:
    """The same for rows that show the same stored picture."""
    image = row["images"][0] if "images" in row else row["image"]
    return (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else id(image)


def open_rows(
    processor: Any, asked: Any, rows: Iterable[Row], with_masks: bool, strict: bool
) -> tuple[list[Question], dict[str, str]]:
    """Rows with their decoded pictures and their texts, and with masks where they have a usable one.

    Args:
        asked: a `Benchmark`, or anything with its `prompt` and `query`.

    Returns:
        The rows whose picture and text can be used, and id -> reason of the others.

    Raises:
        ValueError: if strict, for a bad picture, text or mask; it names the row.
    """
    pictures: dict[Any, Image.Image | None] = {}
    questions, bad = [], {}
    for row in rows:
        try:
            if row.get(UNUSABLE):
                raise ValueError(row[UNUSABLE])
            if "messages" in row:
                questions.append(_guided_question(processor, row))
                continue
            key = picture_key(row)
            if key not in pictures:
                pictures[key] = row_image(row)
            text = _row_text(processor, asked, row, pictures[key] is not None)
        except ValueError as error:
            if strict:
                raise
            bad[row["id"]] = str(error)
            continue
        phrases = []
        for phrase, mask in open_phrases(asked, row, pictures[key], strict, tell=True) if with_masks else ():
            words = [(0, phrase["query"], phrase.get("occurrence") or 0)]
            phrases.append((_marked(processor, messages(asked.prompt(row)), words)[1][0], mask))
        questions.append(Question(row, pictures[key], text, phrases))
    return questions, bad


def open_phrases(
    asked: Any, row: Row, image: Image.Image | None, strict: bool, tell: bool = False
) -> list[tuple[Row, Image.Image]]:
    """The phrases of a question that say what to look at ({query, occurrence}) with their usable masks: those of its
    list `guidance`, without one the whole question with the row's mask. ValueError if strict, for a bad mask; else,
    to `tell`, a line on stderr."""
    said = row["guidance"] if "guidance" in row else [{"query": asked.query(row), "mask": row.get("mask")}]
    found = []
    for phrase in said:
        try:
            mask = row_mask({**row, **phrase}, image)
        except ValueError as error:
            if strict:
                raise
            if tell:
                print(f"{error}; where the model looks is not measured there", file=sys.stderr)
            continue
        if mask is not None:
            found.append((phrase, mask))
    return found


def _marked(
    processor: Any, chat: Sequence[dict], words: Sequence[tuple[int, str, int]]
) -> tuple[str, list[tuple[int, int]]]:
    """The chat's text, and the places in it of words, given as `mark_phrases` takes them."""
    marked, pairs = processor.mark_phrases(chat, words)
    text = processor.apply_chat_template(marked, tokenize=False)
    text, marks = take_marks(text, len({mark for pair in pairs for mark in pair}))
    return text, [(marks[start], marks[end]) for start, end in pairs]


def _guided_question(processor: Any, row: Row) -> Question:
    """A row of `data.rows`, which has its own messages and phrases. ValueError if it is bad."""
    opened = open_row(row)
    check_messages(control_tokens(processor), row, processor.image_token)
    if len(opened["images"]) != 1:
        raise ValueError(f"row {row['id']}: {len(opened['images'])} pictures; looking is measured on rows of one")
    masks = [phrase["mask"] for phrase in opened["guidance"]]
    words = [(said["message_index"], said["query"], said.get("occurrence") or 0) for said in opened["guidance"]]
    text, spans = _marked(processor, row["messages"], words)
    return Question(row, opened["images"][0], text, list(zip(spans, masks, strict=True)))


def row_image(row: Row) -> Image.Image | None:
    """The row's picture, decoded completely; None where the row is asked as text alone. ValueError if it is broken."""
    return None if row["image"] is None else open_image(row["image"], f"row {row['id']}, field image")


def row_mask(row: Row, image: Image.Image | None) -> Image.Image | None:
    """The row's mask of what to look at, or None. ValueError if it is broken, empty or of another size."""
    if row.get("mask") is None:
        return None
    where = f"row {row['id']}, field mask"
    if image is None:
        raise ValueError(f"{where}: marks a part of a picture that is not there; use null")
    mask = open_mask(row["mask"], where, image.size)
    if mask.getbbox() is None:
        raise ValueError(f"{where}: marks no pixel; use null where there is nothing to look at")
    return mask


def _row_text(processor: Any, asked: Any, row: Row, with_picture: bool) -> str:
    try:
        return render(processor, asked.prompt(row), with_picture)
    except ValueError as error:
        raise ValueError(f"row {row['id']}: {error}") from error


def encode_questions(
    model: Any, processor: Any, questions: Sequence[Question]
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """Inputs of a batch, the bool tokens `(B, P, T)` of the rows' phrases, and the masks' bool cells `(B, P, V)`; None
    for both where no row has a mask. P is the most phrases of a row."""
    images, texts = [question.image for question in questions], [question.text for question in questions]
    guidance: dict[str, Any] = {}
    if any(question.phrases for question in questions):
        guidance["guidance_spans"] = [[span for span, _ in question.phrases] for question in questions]
        guidance["guidance_masks"] = [[mask for _, mask in question.phrases] for question in questions]
    batch = encode(model, processor, images, texts, **guidance)
    query, cells = batch.pop("guidance_query_mask", None), batch.pop("guidance_mask", None)
    return batch, query, None if cells is None else cells.flatten(2).bool()


@contextmanager
def each_picture_once(model: Any, keys: Sequence[Any]) -> Iterator[None]:
    """While it lasts, the vision tower of a model of ours sees the distinct pictures of a batch alone.

    Benchmarks ask several questions about a picture (POPE six), and the tower is most of the work of a short answer.
    `keys`: one per row of the batch, equal where rows show the same picture. Other models are left alone.
    """
    tower = getattr(getattr(model, "model", None), "vision_tower", None)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    if tower is None or model.config.model_type != "agevlm" or len(first) == len(keys):
        yield
        return
    chosen = sorted(first.values())
    place = {row: index for index, row in enumerate(chosen)}
    spread = [place[first[key]] for key in keys]

    def reduce(module: torch.nn.Module, inputs: tuple) -> tuple:
        return (inputs[0][chosen], *inputs[1:])

    def expand(module: torch.nn.Module, inputs: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[spread]
        return output

    with tower.register_forward_pre_hook(reduce), tower.register_forward_hook(expand):
        yield
