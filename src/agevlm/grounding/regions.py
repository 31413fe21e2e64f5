"""What passes between the parts of a backend, and the failures a row can end in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from .masks import Box, Polygon


# Failures: there is no mask at all.
NO_PICTURE, BAD_PICTURE, BAD_ROW, NO_QUERY = "no_picture", "bad_picture", "bad_row", "no_query"
TEXT_TOO_LONG, NO_REGION, ERROR = "text_too_long", "no_region", "error"
GROUNDED = "grounded"  # there is a mask; filters have the last word on it


@dataclass
class Region:
    """Where a text is in a picture, before a segmenter has cut it out.

    Attributes:
        boxes: one for each instance, inside the picture; empty where there is none.
        polygons: pieces of all instances, as drawn by Florence-2; to look at.
        outcome: GROUNDED, NO_REGION or TEXT_TOO_LONG.
        detail: what a person would want to know about it.
    """

    boxes: list[Box] = field(default_factory=list)
    polygons: list[Polygon] = field(default_factory=list)
    outcome: str = GROUNDED
    detail: str = ""


@dataclass
class Grounding:
    """The mask of a text in a picture.

    Attributes:
        mask: bool `(height, width)` of the picture, the union over all instances; None where there is none.
        score: the segmenter's own estimate in [0, 1] of how good it is, None where it has none.
    """

    mask: np.ndarray | None
    region: Region
    score: float | None = None


class Backend(Protocol):
    """Pictures and texts to masks. `revisions` names every model with its commit (None: a local folder)."""

    revisions: dict[str, str | None]
    decodes: bool  # whether it looks at pixels; if not, pictures are opened for their size alone

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]: ...
