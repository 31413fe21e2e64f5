"""The rows a run grounds: the share to attempt, their texts, decoding ahead of the models.

Rows are the project's (`data/rows.py`: id, images, messages); the first picture of a row is grounded.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from agevlm.data.masks import subset_hash
from agevlm.data.queries import find_phrase, find_query
from agevlm.data.rows import undecoded
from agevlm.images import open_header, open_image

from .regions import BAD_PICTURE, BAD_ROW, NO_PICTURE, NO_QUERY, NO_REGION, Grounding


def choose_rows(ids: Sequence[str], attempt: int | None, seed: int) -> np.ndarray:
    """The places of the rows to attempt, in order: all, or `attempt` of them by a hash of their ids and `seed`."""
    if attempt is None or attempt >= len(ids):
        return np.arange(len(ids))
    return np.sort(heapq.nsmallest(attempt, range(len(ids)), key=lambda place: subset_hash(ids[place], seed)))


@dataclass
class Item:
    """One row on its way to a backend.

    Attributes:
        text: what is sent to the grounding model.
        query: a part of message `message_index` of `messages`: what guidance reads.
        outcome: a failure where there is no picture or no query, with its `detail`.
    """

    index: int
    id: str
    image: Image.Image | None = None
    text: str | None = None
    query: str | None = None
    message_index: int | None = None
    messages: Sequence[Mapping[str, str]] = ()
    outcome: str = ""
    detail: str = ""


def split_phrases(item: Item, whole: Grounding, most: int) -> list[tuple[dict[str, Any], Grounding]]:
    """The phrases that a row's boxes belong to (see `find_phrase`), at most so many, each with its part of the
    grounding; the first one names what was left out. Without masks, or if one phrase is asked for, it stays whole."""
    if most == 1 or whole.masks is None:
        return [({}, whole)]
    asked, told = (item.text, item.query, item.message_index), [whole.detail] if whole.detail else []
    boxes: dict[Any, list[int]] = {}
    for number, label in enumerate(whole.labels):
        phrase = find_phrase(item.messages, asked, label) if isinstance(label, str) else label
        boxes.setdefault(None if phrase is None else tuple(phrase.items()), []).append(number)
    if lost := boxes.pop(None, []):
        told.append(f"the text has no words of {len(lost)} boxes, such as {whole.labels[lost[0]]!r}")
    if len(boxes) > most:
        told.append(f"the first {most} of {len(boxes)} phrases are used")
    parts = [
        (dict(phrase), Grounding([whole.boxes[n] for n in of], masks=whole.masks[of], scores=whole.scores[of]))
        for phrase, of in boxes.items()
    ] or [({}, Grounding(outcome=NO_REGION))]
    parts[0][1].detail = "; ".join(told)
    return parts[:most]


class Items(TorchDataset):
    """Rows as `Item`s; the fault of a row is recorded in it, not raised.

    Args:
        data: rows with id, images and messages.
        places: the rows to go through.
        query_source: see `find_query`.
        decode: False opens pictures for their size alone.
    """

    def __init__(self, data: Dataset, places: np.ndarray, query_source: str, decode: bool = True):
        self.data = undecoded(data.select_columns(["id", "images", "messages"]))
        self.places, self.query_source, self.decode = places, query_source, decode

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Item:
        index = int(self.places[number])
        row: Mapping[str, Any] = self.data[index]
        item = Item(index, row["id"], messages=row["messages"])
        if not row["images"]:
            item.outcome = NO_PICTURE
            return item
        try:
            found = find_query(row["messages"] or [], self.query_source)
        except (KeyError, TypeError, AttributeError) as error:
            item.outcome, item.detail = BAD_ROW, f"messages cannot be read: {error!r}"
            return item
        if found is None:
            item.outcome = NO_QUERY
            return item
        item.text, item.query, item.message_index = found
        try:
            item.image = (open_image if self.decode else open_header)(row["images"][0], f"row {item.id!r}")
        except ValueError as error:
            item.outcome, item.detail = BAD_PICTURE, str(error)
        return item
