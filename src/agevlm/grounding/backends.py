"""The backends by name, each a text and a picture to a mask: pairs of models, SAM 3, and masks that are there already.

Defaults are the published checkpoints the paper's recipe names or implies (SAM 2.1 is what that recipe's own
repository pairs with Florence-2; the paper's text cites SAM, which is `florence2+sam`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from PIL import Image

from agevlm.data.rows import undecoded

from .choices import GROUNDERS, ONE_STEP, SEGMENTERS, Published, names
from .masks import mask_box, read_mask
from .regions import NO_REGION, Backend, Grounding


class TwoSteps:
    """A grounder (texts to boxes), then a segmenter (boxes to masks) on the pictures in which something was found."""

    decodes = True

    def __init__(self, grounder: Callable, segmenter: Callable, revisions: Mapping[str, str | None]):
        self.grounder, self.segmenter, self.revisions = grounder, segmenter, dict(revisions)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]:
        groundings: list[Grounding] = self.grounder(images, texts)
        found = [index for index, grounding in enumerate(groundings) if grounding.boxes]
        if found:
            results = self.segmenter([images[i] for i in found], [groundings[i].boxes for i in found])
            for index, (mask, score) in zip(found, results, strict=True):
                groundings[index].mask, groundings[index].score = mask, score
        return groundings


class OneStep:
    """SAM 3: texts to masks."""

    decodes = True

    def __init__(self, model: Callable, revisions: Mapping[str, str | None]):
        self.model, self.revisions = model, dict(revisions)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]:
        return self.model(images, texts)


class Exact:
    """Masks that are there already (scenes, imported COCO, another backend's): the same checks, storage and filters.

    Args:
        place: a row's id to its place in `rows`.
        rows: each with `mask`, or with `guidance` that has one, in any form that `open_image` takes; may be null.
    """

    decodes = False

    def __init__(self, place: Mapping[str, int], rows: Sequence[Mapping[str, Any]]):
        self.place, self.rows = place, rows
        self.revisions: dict[str, str | None] = {}

    @classmethod
    def of(cls, data: Dataset) -> "Exact":
        """The masks of a data set with the columns id and mask, or of rows with guidance.

        Raises:
            ValueError: it has neither.
        """
        place = {row_id: index for index, row_id in enumerate(data["id"])}
        if "mask" in data.column_names:
            return cls(place, undecoded(data.select_columns("mask")))
        if "guidance" in data.column_names:
            return cls(place, undecoded(data.select_columns("guidance")))
        raise ValueError(
            f"there are no masks in the columns {', '.join(data.column_names)}; name a data set with id and mask "
            "(--masks)"
        )

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str], ids: Sequence[str]) -> list[Grounding]:
        return [self._one(image, row_id) for image, row_id in zip(images, ids, strict=True)]

    def _one(self, image: Image.Image, row_id: str) -> Grounding:
        row = self.rows[self.place[row_id]] if row_id in self.place else {}
        stored = (row.get("guidance") or row).get("mask")
        if stored is None:
            return Grounding(outcome=NO_REGION, detail="the row has no mask")
        mask = read_mask(stored, row_id)
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"the mask of row {row_id!r} is {mask.shape[1]} x {mask.shape[0]}, its picture {image.width} x "
                f"{image.height}; store masks at the picture's size"
            )
        box = mask_box(mask)
        if box is None:
            return Grounding(outcome=NO_REGION, detail="the row's mask is empty")
        return Grounding([box], mask=mask, score=1.0)


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
        return OneStep(model, {model.name: model.commit})
    first = load(GROUNDERS[first_name], grounder, grounder_revision)
    second = load(SEGMENTERS[second_name], segmenter, segmenter_revision)
    return TwoSteps(first, second, {first.name: first.commit, second.name: second.commit})
