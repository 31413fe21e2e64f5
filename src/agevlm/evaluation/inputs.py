"""Pictures and masks of benchmark rows, shared by generation and grounding; they are decoded here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from agevlm.images import open_image

from .benchmark import Row


def picture_key(row: Row) -> Any:
    """The same for rows that show the same stored picture."""
    image = row["image"]
    return (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else id(image)


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

    hooks = [tower.register_forward_pre_hook(reduce), tower.register_forward_hook(expand)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class RowError(ValueError):
    """A row that cannot be used; the message names it."""


def row_image(row: Row) -> Image.Image | None:
    """The row's picture, decoded completely; None where the row is asked as text alone. RowError if it is broken."""
    if row["image"] is None:
        return None
    try:
        return open_image(row["image"], f"row {row['id']}, field image")
    except ValueError as error:
        raise RowError(str(error)) from error


def row_mask(row: Row, image: Image.Image | None) -> Image.Image | None:
    """The row's mask of what to look at, or None. RowError if it is broken, empty or of another size."""
    if row.get("mask") is None:
        return None
    where = f"row {row['id']}, field mask"
    if image is None:
        raise RowError(f"{where}: marks a part of a picture that is not there; use null")
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
