"""Rows to batches: chat text, pictures, labels on the answers, and guidance where a row has it (section 3.2.2)."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from agevlm.data.rows import open_image, validate_row
from agevlm.processing import AgeVlmProcessor


PER_TOKEN = ("input_ids", "attention_mask", "cross_attention_mask", "guidance_query_mask", "labels")


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

    `labels (B, T)` are the answer tokens of every assistant turn with their end-of-turn token, -100 elsewhere.
    `guidance_query_mask (B, T)` and `guidance_mask (B, N, L)` are there if any row of the batch is guided.

    Raises:
        ValueError: a bad row; the message names the row, the field and the fix.
    """

    processor: AgeVlmProcessor
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    always_pictures: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            validate_row(row)
        images = [[open_image(image, where=f"row {row['id']}") for image in row["images"]] for row in rows]
        guided = [row.get("guidance") for row in rows]
        masks = [
            open_image(guidance["mask"], where=f"row {row['id']}, guidance.mask", mode="1")
            if guidance is not None
            else None
            for row, guidance in zip(rows, guided, strict=True)
        ]
        spans = [
            self.processor.message_span(row["messages"], guidance["message_index"], guidance["query"])
            if guidance is not None
            else None
            for row, guidance in zip(rows, guided, strict=True)
        ]
        batch = self.processor.apply_chat_template(
            [row["messages"] for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={
                "images": images,
                "guidance_spans": spans,
                "guidance_masks": masks,
                "padding": True,
                "padding_side": "right",
                "pad_to_multiple_of": self.pad_to_multiple_of,
            },
        )
        answers = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
        if self.always_pictures and "pixel_values" not in batch:
            blank = self.processor.image_processor(Image.new("RGB", (1, 1)), return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = torch.zeros_like(blank).expand(len(rows), *blank.shape)
            batch["image_mask"] = torch.zeros(len(rows), 1, dtype=torch.bool)
        return self._cut(dict(batch), rows)

    def _cut(self, batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The first `max_length` tokens. Cut here and not by the tokenizer, to know which row would lose a picture."""
        if self.max_length is None:
            return batch
        lost = batch["input_ids"][:, self.max_length :] == self.processor.image_token_id
        for row, placeholders in zip(rows, lost.sum(1).tolist(), strict=True):
            if placeholders:
                raise ValueError(
                    f"row {row['id']}: {placeholders} of its picture placeholders lie behind the first "
                    f"{self.max_length} tokens. Raise `max_length`, or shorten what comes before them."
                )
        return {name: value[:, : self.max_length] if name in PER_TOKEN else value for name, value in batch.items()}
