"""The backends by name, each a text and a picture to a mask: pairs of models, SAM 3, and masks that are there already.

Defaults are the published checkpoints the paper's recipe names or implies (SAM 2.1 is what that recipe's own
repository pairs with Florence-2; the paper's text cites SAM, which is `florence2+sam`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from agevlm.data.masks import OCCURRENCE, mask_places
from agevlm.data.rows import phrases_of, undecoded
from agevlm.images import open_mask

from .choices import GROUNDERS, ONE_STEP, SEGMENTERS, Published, names
from .masks import mask_box
from .regions import NO_REGION, Backend, Grounding


PHRASE = ("query", "message_index", OCCURRENCE)  # which words of a row a mask belongs to


class TwoSteps:
    """A grounder (texts to boxes), then a segmenter (boxes to masks) on the pictures in which something was found.
    Without a segmenter, the grounder makes the masks too (SAM 3)."""

    decodes = True

    def __init__(self, grounder: Callable, segmenter: Callable | None, revisions: Mapping[str, str | None]):
        self.grounder, self.segmenter, self.revisions = grounder, segmenter, dict(revisions)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]:
        groundings: list[Grounding] = self.grounder(images, texts)
        found = [index for index, grounding in enumerate(groundings) if grounding.boxes]
        if found and self.segmenter is not None:
            results = self.segmenter([images[i] for i in found], [groundings[i].boxes for i in found])
            for index, (masks, scores) in zip(found, results, strict=True):
                groundings[index].masks, groundings[index].scores = masks, scores
        return groundings


class Exact:
    """Masks that are there already (scenes, imported COCO, another backend's): the same checks, storage and filters.

    Args:
        places: a row's id to its places in `rows`.
        rows: each with `mask`, or with `guidance` that has some, in any form that `open_image` takes; may be null.
    """

    decodes = False

    def __init__(self, places: Mapping[str, Sequence[int]], rows: Sequence[Mapping[str, Any]]):
        self.places, self.rows = places, rows
        self.revisions: dict[str, str | None] = {}

    @classmethod
    def of(cls, data: Dataset) -> "Exact":
        """The masks of a data set with the columns id and mask, or of rows with guidance.

        Raises:
            ValueError: it has neither.
        """
        columns = [name for name in ("mask", "guidance", *PHRASE) if name in data.column_names]
        if not {"mask", "guidance"}.intersection(columns):
            raise ValueError(
                f"there are no masks in the columns {', '.join(data.column_names)}; name a data set with id and mask "
                "(--masks)"
            )
        ids, starts = mask_places(data)
        places = map(range, starts[:-1].tolist(), starts[1:].tolist())
        return cls(dict(zip(ids, places, strict=True)), undecoded(data.select_columns(columns)))

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]:
        return [self._one(image, row_id) for image, row_id in zip(images, ids, strict=True)]

    def _one(self, image: Image.Image, row_id: str) -> Grounding:
        rows = [self.rows[place] for place in self.places.get(row_id, ())]
        parts = [part for row in rows for part in (phrases_of(row) or [row]) if part.get("mask") is not None]
        masks = [np.array(open_mask(part["mask"], f"mask of row {row_id!r}", image.size)) for part in parts]
        found = [(mask, part) for mask, part in zip(masks, parts, strict=True) if mask.any()]
        if not found:
            return Grounding(outcome=NO_REGION, detail="the row's mask is empty" if parts else "the row has no mask")
        boxes: Any = [mask_box(mask) for mask, _ in found]  # none is empty
        labels = [
            {} if None in (part.get("query"), part.get("message_index")) else {name: part.get(name) for name in PHRASE}
            for _, part in found
        ]
        array = np.array([mask for mask, _ in found])
        return Grounding(boxes, masks=array, scores=np.ones(len(found)), labels=labels)


def load_backend(
    name: str,
    *,
    grounder: str | None = None,
    segmenter: str | None = None,
    grounder_revision: str | None = None,
    segmenter_revision: str | None = None,
    **options: Any,
) -> Backend:
    """A backend of models by name; `exact` is made of masks instead (`Exact`).

    Args:
        grounder, segmenter: repository or folder instead of the default's; `sam3` is a segmenter.
        options: `device`, `dtype`, and `max_new_tokens` for Florence-2.

    Raises:
        ValueError: an unknown name, a part that the backend does not have, or a model that cannot be loaded.
    """
    first_name, _, second_name = name.partition("+")
    if name not in names() or name == "exact":
        raise ValueError(f"the backend is {name!r}; models are {', '.join(names()[:-1])}")
    if grounder is not None and name in ONE_STEP:
        raise ValueError(f"the backend {name} has no grounder; pass its folder as segmenter")
    tokens = options.pop("max_new_tokens", None)

    def load(part: Published, source: str | None, revision: str | None) -> Any:
        from . import models  # here, because it imports a dozen models

        model_class = getattr(models, part.model)
        own = {"max_new_tokens": tokens} if tokens is not None and issubclass(model_class, models.Florence2) else {}
        return model_class(source or part.checkpoint, revision, **part.options, **own, **options)

    if name in ONE_STEP:
        model = load(ONE_STEP[name], segmenter, segmenter_revision)
        return TwoSteps(model, None, {model.name: model.commit})
    first = load(GROUNDERS[first_name], grounder, grounder_revision)
    second = load(SEGMENTERS[second_name], segmenter, segmenter_revision)
    return TwoSteps(first, second, {first.name: first.commit, second.name: second.commit})
