"""The wrong answers to own questions for `results.html`: the picture, and where a model of ours looked."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from PIL import Image

from agevlm.analysis.attention import question_look
from agevlm.analysis.subjects import Subject
from agevlm.drawing import SIDE, enlarge, outline, overlay, peak_of
from agevlm.images import data_address

from .benchmark import Benchmark
from .generate import Prediction
from .inputs import open_phrases, row_image


MOST = 40  # pictures a model


def draw_errors(
    model: Any, processor: Any, benchmark: Benchmark, rows: Dataset, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """The `count` of wrong and unread answers, and `cards` of the first `MOST`: `place` and `id` of a row, `question`,
    `right` answer, `category`, and as `pictures` (`data:` URLs) the picture and, where the model has cross-attention
    maps, the picture under them.

    Args:
        predictions: in the order of `rows`, of which they may be the first ones.
    """
    wrong = [place for place, line in enumerate(predictions) if line["verdict"] in ("wrong", "unparsed")]
    subject, looks = Subject(model, processor), hasattr(model.config, "cross_attention_layers")
    cards = []
    for place in wrong[:MOST]:
        row = rows[place]
        image = row_image(row)
        assert image is not None  # own questions have one
        shown = [enlarge(image)]
        if looks:
            masks = [mask for _, mask in open_phrases(benchmark, row, image, strict=False)]
            shown.append(_draw_look(subject, benchmark.query(row), image, masks))
        pictures = [data_address(picture, "webp", 80, SIDE) for picture in shown]
        said = {"question": benchmark.prompt(row), "right": benchmark.gold(row), "category": row["category"]}
        cards.append({"place": place, "id": row["id"], **said, "pictures": pictures})
    return {"count": len(wrong), "cards": cards}


def _draw_look(subject: Subject, question: str, image: Image.Image, masks: Sequence[Image.Image]) -> Image.Image:
    cells, weights, _ = question_look(subject, image, question, list(subject.attention))
    cells = cells.shrunk(SIDE)
    heat, size = cells.to_pixels(weights.mean(0)), (cells.size[1], cells.size[0])
    drawn = overlay(image.resize(size), heat, peak_of([heat]))
    for mask in masks:
        drawn = outline(drawn, mask)
    return drawn
