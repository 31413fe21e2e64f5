"""What passes between the parts of a backend, and the failures a row can end in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .masks import Box, Polygon


# Failures: there is no mask at all.
NO_PICTURE, BAD_PICTURE, BAD_ROW, NO_QUERY = "no_picture", "bad_picture", "bad_row", "no_query"
TEXT_TOO_LONG, NO_REGION, ERROR = "text_too_long", "no_region", "error"
GROUNDED = "grounded"  # there is a mask; filters have the last word on it


@dataclass
class Grounding:
    """Where a text is in a picture: boxes from a grounder, to which a segmenter adds masks.

    Attributes:
        boxes: one for each instance, inside the picture; empty where there is none.
        polygons: pieces of all instances, as drawn by Florence-2; to look at.
        outcome: GROUNDED, or a failure with its `detail`. Where there is a mask, the detail says that boxes were left
            out, and is empty otherwise.
        masks: of the boxes, bool `(boxes, height, width)` of the picture; None where there is none.
        scores: the segmenter's own estimates in [0, 1] of how good they are, `(boxes,)`; None where it has none.
        labels: the text's words that each box belongs to, or `query`, `message_index` and `occurrence` of the row's
            (empty: the whole text); without entries where this is not known.
    """

    boxes: list[Box] = field(default_factory=list)
    polygons: list[Polygon] = field(default_factory=list)
    outcome: str = GROUNDED
    detail: str = ""
    masks: np.ndarray | None = None
    scores: Any = None
    labels: Sequence[str | Mapping[str, Any]] = ()

    @property
    def mask(self) -> np.ndarray | None:
        """The union over all instances: bool `(height, width)`."""
        return None if self.masks is None else np.any(self.masks, axis=0)

    @property
    def score(self) -> float | None:
        return None if self.scores is None else float(self.scores.mean())


class Backend(Protocol):
    """Pictures and texts to masks. `revisions` names every model with its commit (None: a local folder)."""

    revisions: dict[str, str | None]
    decodes: bool  # whether it looks at pixels; if not, pictures are opened for their size alone

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]: ...


class Grid(Protocol):
    """The cells of a model's grid that a mask takes: part of an image processor."""

    def mask_to_grid(self, mask: np.ndarray) -> np.ndarray: ...

    def grid_to_pixels(self, values: np.ndarray, original_size: tuple[int, int]) -> np.ndarray: ...

    def to_dict(self) -> dict[str, Any]: ...
