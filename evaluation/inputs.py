"""From benchmark rows to model inputs, shared by generation and grounding; pictures are decoded here.

Any processor with a chat template will do: messages are transformers' lists of parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from agevlm.data.rows import open_image

from .benchmark import Row


class RowError(ValueError):
    """A row that cannot be used; the message names it."""


def messages(prompt: str, with_picture: bool = True) -> list[dict[str, Any]]:
    """The conversation that asks `prompt`, about one picture or as text alone."""
    picture = [{"type": "image"}] if with_picture else []
    return [{"role": "user", "content": [*picture, {"type": "text", "text": prompt}]}]


def row_image(row: Row) -> Image.Image | None:
    """The row's picture, decoded completely; None where the row is asked as text alone. RowError if it is broken."""
    if row["image"] is None:
        return None
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
    processor: Any,
    images: Sequence[Image.Image | None],
    prompts: Sequence[str],
    model: torch.nn.Module,
    **guidance: Any,
) -> dict[str, torch.Tensor]:
    """Inputs of a left-padded batch, one prompt and at most one picture per row, on the model's device and in its
    dtype.

    `guidance`: `guidance_spans` and `guidance_masks` for our processor.
    """
    texts = [
        processor.apply_chat_template(messages(prompt, image is not None), add_generation_prompt=True, tokenize=False)
        for prompt, image in zip(prompts, images, strict=True)
    ]
    pictures = [[] if image is None else [image] for image in images]
    batch = processor(
        images=pictures if any(pictures) else None,
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **guidance,
    )
    return dict(batch.to(model.device, model.dtype))
