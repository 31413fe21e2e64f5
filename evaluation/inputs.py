"""From benchmark rows to model inputs, shared by generation and grounding; pictures are decoded here."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from agevlm.data.rows import IMAGE_PLACEHOLDER, open_image

from .benchmark import Row


class RowError(ValueError):
    """A row that cannot be used; the message names it."""


def messages(prompt: str) -> list[dict[str, str]]:
    """The conversation that asks `prompt` about one picture."""
    return [{"role": "user", "content": IMAGE_PLACEHOLDER + prompt}]


def row_image(row: Row) -> Image.Image:
    """The row's picture, decoded completely. RowError if it is broken."""
    try:
        return open_image(row["image"], f"row {row['id']}, field image")
    except ValueError as error:
        raise RowError(str(error)) from error


def row_mask(row: Row, image: Image.Image) -> Image.Image | None:
    """The row's mask of what to look at, or None. RowError if it is broken, empty or of another size."""
    if row.get("mask") is None:
        return None
    where = f"row {row['id']}, field mask"
    try:
        mask = open_image(row["mask"], where, mode="1")
    except ValueError as error:
        raise RowError(str(error)) from error
    if mask.size != image.size:
        raise RowError(f"{where}: {mask.width} x {mask.height} but the picture is {image.width} x {image.height}; "
                       "store the mask at the picture's size")  # fmt: skip
    if mask.getbbox() is None:
        raise RowError(f"{where}: marks no pixel; use null where there is nothing to look at")
    return mask


def encode(
    processor: Any, images: Sequence[Image.Image], prompts: Sequence[str], model: torch.nn.Module, **guidance: Any
) -> dict[str, torch.Tensor]:
    """Inputs of a left-padded batch, one picture and one prompt per row, on the model's device and in its dtype.

    `guidance`: `guidance_spans` and `guidance_masks` for the processor.
    """
    texts = [
        processor.apply_chat_template(messages(prompt), add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    batch = processor(
        images=[[image] for image in images],
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **guidance,
    )
    return dict(batch.to(model.device, model.dtype))
