"""Rows to batches: chat text, pictures, labels on the answers, and guidance where a row has it (section 3.2.2)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers.utils.chat_template_utils import render_jinja_template

from agevlm.data.rows import open_row, phrases_of
from agevlm.images import open_image
from agevlm.models import check_messages, control_tokens
from agevlm.processing import AgeVlmProcessor
from agevlm.processing.image_processing_agevlm import scale_and_shift
from agevlm.processing.processing_agevlm import take_marks
from agevlm.training.features import FeatureStore


ROW_IDS, SKIPPED_ROWS = "row_ids", "skipped_rows"
UNGUIDED_ROWS, PARTLY_GUIDED_ROWS = "unguided_rows", "partly_guided_rows"
PLACE = "place"  # of a row in its set (`PlacedRows`)
PER_TOKEN = ("input_ids", "attention_mask", "cross_attention_mask", "labels")


@dataclass
class AgeVlmDataCollator:
    """Turns a list of rows into one batch of tensors, padded on the right.

    Args:
        processor: of the model that is trained.
        max_length: texts are cut after this many tokens; None keeps them whole.
        pad_to_multiple_of: rounds the padded length up, at most to `max_length`.
        always_pictures: a batch of text alone gets one blank picture a row, which no row has: nothing it computes
            changes, but the tower and the cross blocks run. Where FSDP or DeepSpeed shard them, a process that left
            them out would leave the others waiting for its share. The trainer turns it on there.
        pixels_as_bytes: `pixel_values` are uint8, a quarter of the memory on the way from a worker to the device, and
            `normalized` gives the processor's result there. The trainer turns it on and calls it.
        row_ids: the batch names its rows (`row_ids`, a list of strings), and those with a mask that cannot be guided,
            bad rows included (`unguided_rows`, a list of [place, id, reason]), which the trainer wants and takes out;
            so too those of whose phrases only some can be guided (`partly_guided_rows`). The place is that of
            `PlacedRows`, the id where there is none.
        strict: a bad row is an error. Otherwise an empty turn without picture, mask and answer takes its place, and
            the batch says so (`skipped_rows`, likewise, there if a row is bad). Losses are sums over
            answer tokens and guided rows, so nothing is learned from it and no other row counts more or less; and
            the batch keeps its number of rows, on which processes must agree. The trainer sets it to
            `AgeVlmSFTConfig.strict`, which is off.
        features: a store of features, which then stand in the place of `pixel_values`: pictures are not opened.

    `labels (B, T)` are the answer tokens of every assistant turn with their end-of-turn token, -100 elsewhere.
    `guidance_query_mask (B, P, T)` and `guidance_mask (B, P, N, L)` are there if any row of the batch is guided; P is
    the most phrases of a row.

    A row is bad if `data.rows.open_row` refuses it, if a text spells a control token of the model, or if `max_length`
    cuts one of its placeholders off: the model takes no picture without one.

    Raises:
        ValueError: a bad row, where `strict`; the message names the row, the field and the fix.
    """

    processor: AgeVlmProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    always_pictures: bool = False
    pixels_as_bytes: bool = False
    row_ids: bool = False
    strict: bool = True
    features: FeatureStore | None = None

    @property
    def _pixels(self) -> dict[str, bool]:
        """Arguments of the image processor."""
        return {"do_rescale": False, "do_normalize": False} if self.pixels_as_bytes else {}

    def normalized(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels, rescaled and normalized on their device: float32, equal bit for bit to the processor's."""
        processor = self.processor.image_processor
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        scale, shift = scale_and_shift(factor, processor.do_normalize, processor.image_mean, processor.image_std)
        scale_C11, shift_C11 = (torch.from_numpy(value).to(pixels.device) for value in (scale, shift))
        return pixels.float().mul_(scale_C11).add_(shift_C11)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        skipped: dict[int, str] = {}
        opened: list[dict[str, Any] | None] = []
        for place, row in enumerate(rows):
            try:
                opened.append(self._open(row))
            except ValueError as error:
                if self.strict:
                    raise
                skipped[place] = str(error)
                opened.append(None)
        batch = self._batch(opened)
        cut = self._cut_pictures(batch, rows)
        if cut:
            if self.strict:
                raise ValueError(next(iter(cut.values())))
            skipped |= cut
            # Again without them, because the others are padded to the longest row that is left.
            opened = [None if place in cut else row for place, row in enumerate(opened)]
            batch = self._batch(opened)
        if self.max_length is not None:
            batch = {
                name: value[:, : self.max_length] if name in PER_TOKEN else value for name, value in batch.items()
            }
            if "guidance_query_mask" in batch:
                batch["guidance_query_mask"] = batch["guidance_query_mask"][..., : self.max_length]
        unguided: list[list[str]] = []
        partly: list[list[str]] = []
        for of_row, guided in zip(opened, guided_phrases(batch).tolist(), strict=True):
            lost = [n for n in range(len(of_row["guidance"])) if not guided[n]] if of_row else []
            if of_row and lost:
                reasons = " ".join(self._why_unguided(of_row, number) for number in lost)
                (partly if any(guided) else unguided).append(_listed(of_row, reasons))
        unguided += [_listed(rows[place], skipped[place]) for place in sorted(skipped) if phrases_of(rows[place])]
        for name, listed in ((UNGUIDED_ROWS, unguided), (PARTLY_GUIDED_ROWS, partly)):
            if listed and self.row_ids:
                batch[name] = listed
        if skipped:
            batch[SKIPPED_ROWS] = [_listed(rows[place], skipped[place]) for place in sorted(skipped)]
        return {**batch, ROW_IDS: [str(row.get("id")) for row in rows]} if self.row_ids else batch

    def _open(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its pictures and masks decoded, and rendered."""
        picture = open_image if self.features is None else self.features.open
        opened = open_row(row, picture=picture)
        check_messages(self._control_tokens, row, self.processor.image_token)
        return {**opened, **self._rendered(row["messages"], opened["guidance"])}

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        return control_tokens(self.processor)

    def _rendered(self, messages: list[dict], phrases: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """`text`, and as (start, end) in its characters the `answers` with their end-of-turn tokens and the `spans` of
        the phrases."""
        words = [(phrase["message_index"], phrase["query"], phrase.get("occurrence") or 0) for phrase in phrases]
        messages, pairs = self.processor.mark_phrases(messages, words)
        (text,), (answers,) = render_jinja_template(
            conversations=[messages],
            chat_template=self.processor.chat_template,
            return_assistant_tokens_mask=True,
            **self.processor.tokenizer.special_tokens_map,
        )
        if not phrases:
            return {"text": text, "answers": answers, "spans": []}
        text, marks = take_marks(text, len({mark for pair in pairs for mark in pair}))
        # What lies behind a mark has moved by one character for each.
        marked = [mark + before for before, mark in enumerate(marks)]
        moved = [[place - sum(place > mark for mark in marked) for place in answer] for answer in answers]
        return {"text": text, "answers": moved, "spans": [(marks[start], marks[end]) for start, end in pairs]}

    def _batch(self, rows: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Whole tensors of opened rows; None is a row that cannot be used."""
        nothing: dict[str, Any] = {"images": [], "guidance": []}
        opened = [row or {**nothing, **self._rendered([{"role": "user", "content": ""}])} for row in rows]
        processor = self.processor if self.features is None else self.features.reading(self.processor)
        batch = processor(
            text=[row["text"] for row in opened],
            images=[row["images"] for row in opened],
            guidance_spans=[row["spans"] for row in opened],
            guidance_masks=[[phrase["mask"] for phrase in row["guidance"]] for row in opened],
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_offsets_mapping=True,
            return_tensors="pt",
            **self._pixels,
        )
        offsets_BT2 = torch.tensor(batch.pop("offset_mapping"))
        answers_BT = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for tokens, learned, row in zip(offsets_BT2, answers_BT, opened, strict=True):
            for start, end in row["answers"]:
                learned |= (tokens[:, 0] < end) & (tokens[:, 1] > start)
        batch["labels"] = batch["input_ids"].masked_fill(~answers_BT, -100)
        if self.always_pictures and "pixel_values" not in batch:
            blank = self.processor.image_processor(Image.new("RGB", (1, 1)), return_tensors="pt", **self._pixels)
            blank = blank["pixel_values"]
            batch["pixel_values"] = torch.zeros_like(blank).expand(len(rows), *blank.shape)
            batch["image_mask"] = torch.zeros(len(rows), 1, dtype=torch.bool)
        return dict(batch)

    def _why_unguided(self, row: dict[str, Any], number: int) -> str:
        """Why a phrase with a mask and a query in its row's text cannot be guided."""
        phrase, (start, _) = row["guidance"][number], row["spans"][number]
        name = f"row {row['id']}" + (f", guidance[{number}] {phrase['query']!r}" if len(row["guidance"]) > 1 else "")
        if not self.processor.image_processor.mask_to_grid(phrase["mask"]).any():
            return f"{name}: its mask covers no cell of the grid. Look at the mask and the geometry of the processor."
        if row["text"].find(self.processor.image_token) > start:
            return (
                f"{name}: its query stands before the picture, and a token sees only earlier pictures. Put "
                f"{self.processor.image_token} in front of the query."
            )
        return (
            f"{name}: its query lies behind the first {self.max_length} tokens. Raise `max_length`, or shorten what "
            "comes before it."
        )

    def _cut_pictures(self, batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> dict[int, str]:
        """Which rows would lose a picture, by place, and why. The tokenizer, cutting by itself, would not tell."""
        if self.max_length is None:
            return {}
        lost = batch["input_ids"][:, self.max_length :] == self.processor.image_token_id
        return {
            place: f"row {rows[place]['id']}: {placeholders} of its picture placeholders lie behind the first "
            f"{self.max_length} tokens. Raise `max_length`, or shorten what comes before them."
            for place, placeholders in enumerate(lost.sum(1).tolist())
            if placeholders
        }


def _listed(row: Mapping[str, Any], reason: str) -> list[str]:
    """[place, id, reason] of a row."""
    row_id = str(row.get("id"))
    return [row.get(PLACE, row_id), row_id, reason]


class PlacedRows(Dataset):
    """Rows that say which they are: `place`, such as `train[7]`. Ids may be missing, or stand twice.

    Args:
        rows: any data set with a length.
        name: of the set.
    """

    def __init__(self, rows: Any, name: str):
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        many = getattr(self.rows, "__getitems__", None)
        rows = [self.rows[index] for index in indices] if many is None else many(indices)
        return [{**row, PLACE: f"{self.name}[{index}]"} for row, index in zip(rows, indices, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]


def guided_phrases(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which phrases of a batch's rows are guided: (batch, phrases) bool. A row is guided if any of them is.

    A phrase needs a mask with a cell and a query with a token that sees a picture. Truncation may have cut the query
    off, and tokens before the picture have no attention.
    """
    if "guidance_mask" not in batch:
        return torch.zeros(batch["input_ids"].shape[0], 1, dtype=torch.bool, device=batch["input_ids"].device)
    query = batch["guidance_query_mask"].bool()
    if "cross_attention_mask" in batch:
        query = query & batch["cross_attention_mask"].any(dim=-1)[:, None]
    return batch["guidance_mask"].flatten(2).any(dim=-1) & query.any(dim=-1)
