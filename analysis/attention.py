"""Where a model looks while it reads a question: maps per cross layer, on the pixels of the picture (paper figure 4).

    agevlm analyze attention MODEL... IMAGE QUESTION --output DIR

A map is the softmax of one cross layer, averaged over heads and the question's tokens; it is brought back to the
picture through the processor's own geometry. The paper shows one layer; here every layer and their mean are kept. All
maps of one question are drawn on one colour scale: a model that looks everywhere stays pale, where a scale of its own
would make noise glow.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from agevlm.data.rows import IMAGE_PLACEHOLDER, open_image
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor

from .drawing import outline, overlay, panels


LEAST_PEAK = 5.0  # times an even spread: attention without any focus must not glow


@dataclass(frozen=True)
class Attended:
    """An answer and the look behind it.

    Attributes:
        answer: generated greedily.
        layers: indices of the cross layers, K of them.
        grid: float32 `(K, rows, columns)`, attention per visual cell; a layer sums to 1.
        maps: float32 `(K, height, width)`, the same on the picture's pixels.
    """

    answer: str
    layers: list[int]
    grid: np.ndarray
    maps: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """float32 `(height, width)`: mean over layers."""
        return self.maps.mean(0)


@torch.inference_mode()
def attend(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 64,
) -> Attended:
    """Asks `question` about `image` and reads off the cross-attention of the question's tokens.

    Args:
        prompt: what the model is asked, with `question` as a part of it (a benchmark's instruction follows it, say).
            Default: the question itself.

    Raises:
        ValueError: an empty question, or one that is not a part of the prompt.
    """
    question = question.strip()
    if not question:
        raise ValueError("the question is empty; ask something about the picture")
    conversation = [{"role": "user", "content": IMAGE_PLACEHOLDER + (prompt or question)}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    everywhere = Image.new("1", image.size, 1)  # the processor selects query tokens of rows that have a mask
    batch = processor(
        images=[[image]],
        text=[text],
        guidance_spans=[processor.message_span(conversation, 0, question)],
        guidance_masks=[everywhere],
        return_tensors="pt",
    ).to(model.device, model.dtype)
    batch.pop("guidance_mask")
    query_mask = batch.pop("guidance_query_mask")
    maps = model.base_model(**batch, guidance_query_mask=query_mask, use_cache=False).cross_attention_maps
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    answer = processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    grid = maps[:, 0].float().cpu().numpy().reshape(-1, *processor.image_processor.grid)
    size = (image.height, image.width)
    pixels = np.stack([processor.image_processor.grid_to_pixels(layer, size) for layer in grid])
    return Attended(answer.strip(), list(model.config.cross_attention_layers), grid, pixels)


def in_mask_mass(attended: Attended, mask: Image.Image, processor: Any) -> float:
    """Share of the attention on the mask's cells, mean over layers."""
    cells = processor.image_processor.mask_to_grid(mask)
    return float((attended.grid * cells).sum((1, 2)).mean())


def _shared_peak(attended: Iterable[Attended], maps: Callable[[Attended], np.ndarray]) -> float:
    """The hottest value of maps that are compared, and never less than `LEAST_PEAK` times an even spread."""
    return max(max(float(maps(result).max()), LEAST_PEAK / result.grid[0].size) for result in attended)


def draw_panels(
    attended: Mapping[str, Attended], image: Image.Image, question: str, mask: Image.Image | None = None
) -> Image.Image:
    """One row per model: the picture, each layer, their mean; one colour scale for all."""
    peak = _shared_peak(attended.values(), lambda result: result.maps)
    rows = []
    for name, result in attended.items():
        shown = image if mask is None else outline(image, mask)
        row = [(f"{name}: {result.answer}", shown)]
        row += [
            (f"layer {layer}", overlay(image, heat, peak, mask))
            for layer, heat in zip(result.layers, result.maps, strict=True)
        ]
        rows.append([*row, ("mean", overlay(image, result.mean, peak, mask))])
    return panels(rows, question)


def write_attention(
    models: Mapping[str, tuple[Any, Any]],
    image: Image.Image,
    question: str,
    output: str | Path,
    mask: Image.Image | None = None,
) -> dict[str, Any]:
    """Writes `overlay-NAME.png` per model, `panels.png`, `maps.npz` (one array `(K, height, width)` per model) and
    `attention.json`, whose content it returns.

    Args:
        models: name -> (model, processor).
        mask: of the picture's size; outlined, and the attention inside it is measured.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    if mask is not None and mask.size != image.size:
        raise ValueError(
            f"the mask is {mask.width} x {mask.height} but the picture is {image.width} x {image.height}; give a mask "
            "of the picture's size"
        )
    attended = {name: attend(*pair, image, question) for name, pair in models.items()}
    peak = _shared_peak(attended.values(), lambda result: result.mean)
    summary: dict[str, Any] = {"question": question, "maps": "maps.npz", "panels": "panels.png", "models": {}}
    for name, result in attended.items():
        picture = f"overlay-{_file_name(name)}.png"
        _save(overlay(image, result.mean, peak, mask), output / picture)
        summary["models"][name] = {"answer": result.answer, "layers": result.layers, "overlay": picture}
        if mask is not None:
            summary["models"][name]["in_mask_mass"] = in_mask_mass(result, mask, models[name][1])
    _save(draw_panels(attended, image, question, mask), output / "panels.png")
    with _replacing(output / "maps.npz") as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {name: result.maps for name, result in attended.items()}
        np.savez_compressed(file, **arrays)
    with _replacing(output / "attention.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def write_examples(
    models: Mapping[str, tuple[Any, Any]],
    rows: Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    prompt: Callable[[Mapping[str, Any]], str] | None = None,
    correct: Callable[[Mapping[str, Any], str], bool] | None = None,
) -> list[dict[str, Any]]:
    """Draws benchmark rows for the report: the picture with the mask's outline, and every model's mean map.

    Args:
        models: title -> (model, processor), in the order of the panels.
        rows: with `id`, `image`, `question`, `answer` and, where there is something to look at, `mask`.
        output: folder for the pictures.
        prompt: what is asked about a row. Default: its question.
        correct: whether an answer to a row is right. Default: unknown.

    Returns:
        One `agevlm.analysis.results.Example` per row.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    examples = []
    for row in rows:
        image = open_image(row["image"], f"row {row['id']}, field image")
        mask = None if row.get("mask") is None else open_image(row["mask"], f"row {row['id']}, field mask", mode="1")
        question = row["question"].split("\n", 1)[0]  # options and instructions stand on lines of their own
        asked = row["question"] if prompt is None else prompt(row)
        attended = {name: attend(*pair, image, question, prompt=asked) for name, pair in models.items()}
        peak = _shared_peak(attended.values(), lambda result: result.mean)
        stem = _file_name(row["id"])
        picture = output / f"{stem}.png"
        _save(image if mask is None else outline(image, mask), picture)
        drawn = []
        for name, result in attended.items():
            path = output / f"{stem}-{_file_name(name)}.png"
            _save(overlay(image, result.mean, peak, mask), path)
            drawn.append(
                {
                    "title": name,
                    "answer": result.answer,
                    "correct": None if correct is None else correct(row, result.answer),
                    "in_mask_mass": None if mask is None else in_mask_mass(result, mask, models[name][1]),
                    "overlay": str(path),
                }
            )
        examples.append(
            {
                "id": row["id"],
                "question": question,
                "answer": row["answer"],
                "image": str(picture),
                "has_mask": mask is not None,
                "panels": drawn,
            }
        )
    return examples


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` once it has been written."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save(image: Image.Image, path: Path) -> None:
    with _replacing(path) as temporary:
        image.save(temporary)


def load_checkpoint(name: str) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model (in its stored dtype, on the accelerator if there is one) and processor.

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    try:
        model_type = AgeVlmConfig.get_config_dict(name)[0].get("model_type")
        if model_type != AgeVlmConfig.model_type:
            raise ValueError(
                f"{name} is no AGE-VLM checkpoint: its model type is {model_type!r}, not {AgeVlmConfig.model_type!r}"
            )
        device = torch.accelerator.current_accelerator(check_available=True)
        model = AgeVlmForConditionalGeneration.from_pretrained(name, dtype="auto", device_map=device)
        return model.eval(), AgeVlmProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"{name} is no AGE-VLM checkpoint: {error}; give its folder or Hub id") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="agevlm analyze attention", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or Hub id of a checkpoint; several compare")
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--mask", metavar="FILE", help="black and white picture of what the question is about")
    arguments = parser.parse_args(argv)
    image = open_image(arguments.image, arguments.image)
    mask = None if arguments.mask is None else open_image(arguments.mask, arguments.mask, mode="1")
    names = [Path(model).resolve().name for model in arguments.models]
    if len(set(names)) != len(names):
        raise ValueError(f"two models are called the same ({', '.join(names)}); rename a folder")
    models = {name: load_checkpoint(path) for name, path in zip(names, arguments.models, strict=True)}
    summary = write_attention(models, image, arguments.question, arguments.output, mask)
    for name, result in summary["models"].items():
        mass = f" (in-mask attention mass {result['in_mask_mass']:.3f})" if mask is not None else ""
        print(f"{name}: {result['answer']}{mass}")
    print(f"written to {arguments.output}")
