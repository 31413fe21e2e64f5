"""The wrong answers to own questions as cards of `results.html`: the picture, and where a model of ours looked."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from datasets import Dataset
from PIL import Image

from agevlm.analysis.attention import question_look
from agevlm.analysis.subjects import Subject
from agevlm.drawing import SIDE, enlarge, outline, overlay, peak_of
from agevlm.images import data_address

from .benchmark import Benchmark
from .generate import Prediction
from .inputs import open_phrases, row_image, without_pictures


MOST = 40  # pictures a model
WRONG = ("wrong", "unparsed")


class Card(TypedDict):
    """A wrong answer. `pictures`: as `data:` URLs; `answers`: model -> {output, tone}."""

    id: str
    question: str
    right: str
    category: str
    pictures: list[str]
    answers: dict[str, dict[str, str]]


def wrong_rows(predictions: Sequence[Prediction]) -> list[int]:
    """Places of the answers that are wrong or unread."""
    return [index for index, line in enumerate(predictions) if line["verdict"] in WRONG]


def draw_errors(
    model: Any, processor: Any, benchmark: Benchmark, rows: Dataset, predictions: Sequence[Prediction]
) -> dict[int, list[str]]:
    """Place of a row -> its picture, and the picture under the model's attention where it has cross-attention maps.

    Of the first `MOST` wrong answers; `predictions` in the order of `rows`.
    """
    subject = Subject(model, processor)
    looks = hasattr(model.config, "cross_attention_layers")
    drawn = {}
    for index in wrong_rows(predictions)[:MOST]:
        row = rows[index]
        image = row_image(row)
        assert image is not None  # own questions have one
        shown = [enlarge(image)]
        if looks:
            masks = [mask for _, mask in open_phrases(benchmark, row, image, strict=False)]
            shown.append(_draw_look(subject, benchmark.query(row), image, masks))
        drawn[index] = [data_address(picture, "webp", 80, SIDE) for picture in shown]
    return drawn


def _draw_look(subject: Subject, question: str, image: Image.Image, masks: Sequence[Image.Image]) -> Image.Image:
    cells, weights, _ = question_look(subject, image, question)
    cells = cells.shrunk(SIDE)
    heat, size = cells.to_pixels(weights.mean(0)), (cells.size[1], cells.size[0])
    drawn = overlay(image.resize(size), heat, peak_of([heat]))
    for mask in masks:
        drawn = outline(drawn, mask)
    return drawn


def error_cards(
    benchmark: Benchmark,
    rows: Dataset,
    predictions: Mapping[str, Sequence[Prediction]],
    drawn: Mapping[str, Mapping[int, list[str]]],
) -> dict[str, dict[str, Any]]:
    """Model -> `note` and `cards` of its wrong answers, each beside what the other models answered.

    Args:
        drawn: model -> what `draw_errors` returned.
    """
    asked = list(without_pictures(rows))
    result = {}
    for model, pictures in drawn.items():
        cards: list[Card] = []
        for index, shown in pictures.items():
            row = asked[index]
            answers = {
                name: {
                    "output": lines[index]["output"] or "(nothing)",
                    "tone": "right" if lines[index]["verdict"] == "correct" else "wrong",
                }
                for name, lines in predictions.items()
            }
            cards.append({"id": row["id"], "question": benchmark.prompt(row), "right": benchmark.gold(row),
                          "category": row["category"], "pictures": shown, "answers": answers})  # fmt: skip
        count = len(wrong_rows(predictions[model]))
        note = f"{count} wrong or unread answers" + (f", of which the first {MOST}." if count > MOST else ".")
        result[model] = {"note": note, "cards": cards}
    return {model: found for model, found in result.items() if found["cards"]}
