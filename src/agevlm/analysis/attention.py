"""Where a model looks while it reads a question and while it answers (paper, tables 4 and 6).

A map is the softmax of one layer, averaged over heads and the question's tokens, on the pixels of the picture: of
every cross layer of ours, and of the first self-attention layer of a concatenating model, as in the paper (`--layer`
for others). A generated token's map is the look from which it was predicted, that of the token before it. In
self-attention the visual tokens get a part of the attention only; maps are rescaled to sum to 1 over them, and
`image_mass` tells how much it was.

Maps are densities: 1 is an even spread over the picture, so models of different grids compare. All maps of one
question are drawn on one color scale: a model that looks everywhere stays pale, where a scale of its own would make
noise glow.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from agevlm.drawing import outline, overlay, panels, peak_of
from agevlm.images import open_image, open_mask, save_image
from agevlm.models import load, unique_names
from agevlm.progress import written
from agevlm.store import write_json

from .cells import Cells, cells_of
from .recording import Recorder, recording
from .resume import file_name, save_arrays
from .subjects import Encoded, Subject


LAYERS_DRAWN = 8  # at most, evenly spaced; the arrays hold all
COLUMNS = 6  # of the sheet of generated tokens
PANEL_SIDE, TOKEN_SIDE = 320, 200  # pixels of a drawn picture on the sheets
TOKEN_MAP_SIDE = 1024  # pixels at most: a token's map each, of a large photograph, would be gigabytes


class Look(TypedDict):
    """A map of one model (`title`: the layer, or the mean) and the file of its overlay."""

    title: str
    in_mask_mass: float | None
    overlay: str


class Panel(TypedDict):
    """One model's answer to an example, and its looks: see [`Attended.looks`]."""

    title: str
    answer: str
    correct: bool
    looks: list[Look]


class Example(TypedDict):
    """A question and how every model looked. `image`: file of the picture with the mask's outline; `peak`: what the
    hottest color stands for, in times an even spread."""

    id: str
    question: str
    answer: str
    image: str
    peak: float
    panels: list[Panel]


@dataclass(frozen=True)
class Attended:
    """An answer and the look behind it; K layers, V visual tokens, N generated tokens.

    Attributes:
        answer: generated greedily.
        tokens: the N generated tokens as text, the end of the answer included.
        special: bool, N of them: which are no part of the answer's text, such as its end.
        layers: indices of the layers.
        pictures: where the visual tokens lie on each picture, those of the first come first.
        weights: float32 `(K, V)`, attention of the question on the visual tokens; a layer sums to 1.
        token_weights: float32 `(K, N, V)`, the same of each generated token.
        image_mass: float32 `(K,)`, share of the question's attention that went to the picture; 1 in cross-attention.
        words: float32 `(K, Q, V)`, attention of each of the question's tokens on the visual tokens, as it is.
        question, places: its text, and there the characters (start, end) of each token.
    """

    answer: str
    tokens: list[str]
    special: list[bool]
    layers: list[int]
    pictures: tuple[Cells, ...]
    weights: np.ndarray
    token_weights: np.ndarray
    image_mass: np.ndarray
    words: np.ndarray
    question: str
    places: list[tuple[int, int]]

    def part(self, phrase: str, start: int = 0) -> np.ndarray:
        """`(K, V)`: as `weights`, of a part of the question, looked for from `start`; 0 where it has no token."""
        start = self.question.index(phrase, start)
        chosen = [left < start + len(phrase) and right > start for left, right in self.places]
        return _normalized(self.words[:, chosen].sum(1))

    @property
    def cells(self) -> Cells:
        """Where the visual tokens lie on the picture, of a question about a single one."""
        (cells,) = self.pictures
        return cells

    def spread(self, weights: np.ndarray, side: int) -> list[np.ndarray]:
        """Attention `(V,)` on each picture, scaled down to at most `side` pixels: 1 is an even spread over all."""
        cells = [picture.shrunk(side) for picture in self.pictures]
        parts = np.split(weights, np.cumsum([picture.count for picture in cells])[:-1])
        return [len(cells) * picture.to_pixels(part) for picture, part in zip(cells, parts, strict=True)]

    @cached_property
    def maps(self) -> np.ndarray:
        """float32 `(K, height, width)`: `weights` on the picture's pixels; 1 is an even spread over the picture."""
        return np.stack([self.cells.to_pixels(layer) for layer in self.weights])

    @property
    def mean(self) -> np.ndarray:
        """float32 `(height, width)`: mean over layers."""
        return self.maps.mean(0)

    @property
    def looks(self) -> dict[str, slice]:
        """Kind -> the layers of what is drawn: the `first` one, as in the paper's tables 4 and 6, and all of them for
        the `mean`; of a single layer that alone."""
        return ({"first": slice(1)} if len(self.layers) > 1 else {}) | {"mean": slice(None)}


@torch.inference_mode()
def attend(
    model: Any,
    processor: Any,
    image: Image.Image | Sequence[Image.Image],
    question: str,
    *,
    prompt: str | None = None,
    before: Sequence[tuple[str, str]] = (),
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    streamer: BaseStreamer | None = None,
) -> Attended:
    """Asks `question` about `image` and reads off where the question's tokens and the answer's look.

    Args:
        model: ours or a concatenating one, on sdpa; `generate` runs once, and its result is what it is without this.
        image: the picture or pictures, which the conversation begins with.
        before: questions and answers of the conversation so far.
        prompt: what the model is asked, with `question` as a part of it (a benchmark's instruction follows it, say).
            Default: the question itself.
        layers: indices. Default: all cross layers, or the first self-attention layer.
        streamer: transformers' own; gets the answer token by token.

    Raises:
        ValueError: an empty question, or one that is not a part of the prompt; a layer that there is not; a model
            whose visual tokens cannot be placed on the picture.
    """
    subject = Subject(model, processor)
    chosen = choose_layers(subject, layers)
    question = question.strip()
    if not question:
        raise ValueError("the question is empty; ask something about the picture")
    images = [image] if isinstance(image, Image.Image) else list(image)
    encoded = subject.encode([images], [prompt or question], [question], before=before, answer_next=True)
    if len(images) == 1 or not subject.concatenates:
        pictures = [cells_of(subject, picture, encoded) for picture in images]
    else:
        pictures = [cells_of(subject, picture, subject.encode([picture], [question])) for picture in images]
    with recording(chosen, _question_and_last(encoded)) as recorders:
        output = model.generate(
            **encoded.inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            streamer=streamer,
        )
    generated = output[0, encoded.text_BT.shape[1] :]
    words, token_weights = _looks(recorders, encoded, len(generated))
    if words.shape[-1] != (count := sum(cells.count for cells in pictures)):
        raise ValueError(
            f"{len(images)} pictures have {words.shape[-1]} visual tokens together and {count} one by one, so they "
            "cannot be told apart; ask about a single picture"
        )
    tokenizer = processor.tokenizer
    return Attended(
        answer=tokenizer.decode(generated, skip_special_tokens=True).strip(),
        tokens=[tokenizer.decode([token]) for token in generated.tolist()],
        special=[not tokenizer.decode([token], skip_special_tokens=True) for token in generated.tolist()],
        layers=list(chosen),
        pictures=tuple(pictures),
        weights=_normalized(words.mean(1)),
        token_weights=token_weights,
        image_mass=words.mean(1).sum(-1),
        words=words,
        question=question,
        places=encoded.places[0],
    )


@torch.inference_mode()
def question_look(
    subject: Subject, image: Image.Image, question: str, layers: Sequence[int]
) -> tuple[Cells, np.ndarray, np.ndarray]:
    """The look of the question's tokens alone, without an answer: cells, `weights (K, V)` and `image_mass (K,)` of
    [`Attended`]."""
    encoded = subject.encode([image], [question], answer_next=True)
    with recording(choose_layers(subject, layers), _question_and_last(encoded)) as recorders:
        subject.model.base_model(**encoded.inputs, use_cache=False)
    look = _looks(recorders, encoded, 0)[0].mean(1)
    return cells_of(subject, image, encoded), _normalized(look), look.sum(-1)


def _question_and_last(encoded: Encoded) -> torch.Tensor:
    """Positions of the question's tokens, and of the prompt's last one, which predicts the first of the answer."""
    return torch.cat([encoded.text_BT[0].nonzero()[:, 0].cpu(), torch.tensor([encoded.text_BT.shape[1] - 1])])


def choose_layers(subject: Subject, wanted: Sequence[int] | None) -> dict[int, torch.nn.Module]:
    """Index -> attention of the wanted layers; by default all cross layers, or the first self-attention layer."""
    known = subject.attention
    if wanted is None:
        wanted = list(known)[:1] if subject.concatenates else list(known)
    unknown = [index for index in wanted if index not in known]
    if unknown or not wanted:
        raise ValueError(f"no attention on pictures in layer(s) {unknown}; there is in {list(known)}")
    return {index: known[index] for index in sorted(set(wanted))}


def _looks(recorders: Mapping[int, Recorder], encoded: Encoded, generated: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention on the visual tokens per layer: of each of the question's tokens `(K, Q, V)`, and of every generated
    token `(K, N, V)`, each summing to 1."""
    columns: Any = slice(None) if encoded.image_BT is None else encoded.image_BT[0].cpu().numpy()
    questions, answers = [], []
    for recorder in recorders.values():
        prompt, *steps = (weights.numpy() for weights in recorder.weights)
        # Later steps have more keys: the text that has been generated.
        last = [row[:, : prompt.shape[1]][:, columns] for row in (prompt[-1:], *steps)]
        questions.append(prompt[:-1, columns])
        answers.append(_normalized(np.concatenate(last)[:generated]))
    return np.stack(questions), np.stack(answers)


def _normalized(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 over the last axis, where they are not all 0."""
    totals = weights.sum(-1, keepdims=True)
    return weights / np.where(totals > 0, totals, 1)


def in_mask_mass(attended: Attended, mask: Image.Image, layers: slice = slice(None)) -> float:
    """Share of the attention on the mask's cells, mean over `layers` (default: all)."""
    return float(attended.weights[layers, attended.cells.inside(np.asarray(mask))].sum(1).mean())


def _reduced(attended: Attended, image: Image.Image, mask: Image.Image | None, side: int) -> tuple[
    Cells, Image.Image, Image.Image | None
]:  # fmt: skip
    """Cells, picture and mask for a drawing whose longer side has at most `side` pixels."""
    cells = attended.cells.shrunk(side)
    size = cells.size[1], cells.size[0]
    return cells, image.resize(size), None if mask is None else mask.resize(size, Image.Resampling.NEAREST)


def _peak(results: Iterable[Attended]) -> float:
    """The color scale of all looks of one question."""
    return peak_of(result.maps[layers].mean(0) for result in results for layers in result.looks.values())


def draw_panels(
    attended: Mapping[str, Attended], image: Image.Image, mask: Image.Image | None = None, phrases: Sequence[str] = ()
) -> Image.Image:
    """One row per model: the picture, each layer, their mean; then one with the mean of each phrase of the question.
    One color scale for all."""
    rows: list[list[tuple[str, Any]]] = []
    for name, result in attended.items():
        cells, small, outlined = _reduced(result, image, mask, 2 * PANEL_SIDE)
        count = len(result.layers)
        drawn = sorted({round(index) for index in np.linspace(0, count - 1, min(count, LAYERS_DRAWN))})
        row = [(_layer_title(result, index), cells.to_pixels(result.weights[index])) for index in drawn]
        if count > 1:
            row.append(("mean", cells.to_pixels(result.weights.mean(0))))
        rows.append([(f"{name}: {result.answer}", None), *row])
        if phrases:
            rows.append([(words, cells.to_pixels(result.part(words).mean(0))) for words in phrases])
    peak = peak_of(heat for row in rows for _, heat in row if heat is not None)
    shown = small if outlined is None else outline(small, outlined)
    titled = [
        [(title, shown if heat is None else overlay(small, heat, peak, outlined)) for title, heat in row]
        for row in rows
    ]
    return panels(titled, result.question, PANEL_SIDE, [peak])


def _layer_title(attended: Attended, index: int) -> str:
    mass = attended.image_mass[index]
    part = "" if mass > 0.9995 else f", {100 * mass:.0f} % on the picture"  # of cross-attention it is all
    return f"layer {attended.layers[index]}{part}"


def draw_tokens(attended: Attended, image: Image.Image, question: str, mask: Image.Image | None = None) -> Image.Image:
    """A sheet of one overlay per generated token (mean over layers), one color scale for all."""
    cells, small, outlined = _reduced(attended, image, mask, 2 * TOKEN_SIDE)
    maps = [cells.to_pixels(weights) for weights in attended.token_weights.mean(0)]
    peak = peak_of(maps)
    titled = [
        (repr(token)[1:-1], overlay(small, heat, peak, outlined))
        for token, heat in zip(attended.tokens, maps, strict=True)
    ]
    rows = [titled[start : start + COLUMNS] for start in range(0, len(titled), COLUMNS)]
    return panels(rows, question, TOKEN_SIDE, [peak])


def write_attention(
    models: Mapping[str, tuple[Any, Any]],
    image: Image.Image,
    question: str,
    output: str | Path,
    mask: Image.Image | None = None,
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    phrases: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes `panels.png`, per model `overlay-NAME.png` (mean over layers), `first-NAME.png` (of several layers the
    first) and `tokens-NAME.png`, the arrays `maps.npz` and `attention.json`, whose content it returns.

    `maps.npz` holds, per model, `NAME/maps (K, height, width)` and `NAME/mean (height, width)` in float32,
    `NAME/token_maps (N, height, width)` in float16 (mean over layers; of a picture scaled down to `TOKEN_MAP_SIDE`
    pixels where it is larger), and on the visual tokens `NAME/weights (K, V)` and `NAME/token_weights (K, N, V)`; see
    [`Attended`]. Overlays are of the picture's proportions, without a frame; `overlay_peak` says what their hottest
    color stands for, in times an even spread.

    Args:
        models: name -> (model, processor).
        mask: of the picture's size; outlined, and the attention inside it is measured.
        phrases: parts of the question, each with a panel of its own.
    """
    if lost := [words for words in phrases if words not in question]:
        raise ValueError(f"the question {question!r} does not hold the phrase {lost[0]!r}; copy it from there")
    mask = mask and open_mask(mask, "the mask", image.size)
    attended = {
        name: attend(*pair, image, question, layers=layers, max_new_tokens=max_new_tokens)
        for name, pair in models.items()
    }
    output, peak = Path(output), _peak(attended.values())
    summary: dict[str, Any] = {"question": question, "maps": "maps.npz", "panels": "panels.png", "overlay_peak": peak,
                               "models": {}}  # fmt: skip
    arrays: dict[str, Any] = {}
    for name, result in attended.items():
        pictures = {}
        for kind, layers_drawn in result.looks.items():
            key = "overlay" if kind == "mean" else kind
            pictures[key] = f"{key}-{file_name(name)}.png"
            save_image(overlay(image, result.maps[layers_drawn].mean(0), peak, mask), output / pictures[key])
        pictures["tokens"] = f"tokens-{file_name(name)}.png"
        save_image(draw_tokens(result, image, f"{name}: {question}", mask), output / pictures["tokens"])
        summary["models"][name] = {
            "answer": result.answer,
            "generated": result.tokens,
            "layers": result.layers,
            "image_mass": [round(float(mass), 6) for mass in result.image_mass],
            **pictures,
        }
        if mask is not None:
            summary["models"][name]["in_mask_mass"] = in_mask_mass(result, mask)
        small = result.cells.shrunk(TOKEN_MAP_SIDE)
        token_maps = np.stack([small.to_pixels(w).astype(np.float16) for w in result.token_weights.mean(0)])
        arrays |= {f"{name}/maps": result.maps, f"{name}/mean": result.mean, f"{name}/token_maps": token_maps}
        arrays |= {f"{name}/weights": result.weights, f"{name}/token_weights": result.token_weights}
    save_image(draw_panels(attended, image, mask, phrases), output / "panels.png")
    save_arrays(arrays, output / "maps.npz")
    write_json(output / "attention.json", summary)
    return summary


def write_examples(
    models: Mapping[str, tuple[Any, Any]],
    rows: Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    prompt: Callable[[Mapping[str, Any]], str],
    correct: Callable[[Mapping[str, Any], str], bool],
) -> list[Example]:
    """Draws benchmark rows for the report: the picture with the mask's outline, and every model's looks.

    Args:
        models: title -> (model, processor), in the order of the panels.
        rows: with `id`, `image`, `question`, `answer` and, where there is something to look at, `mask`.
        output: folder for the pictures.
        prompt: what is asked about a row.
        correct: whether an answer to a row is right.
    """
    output = Path(output)
    examples: list[Example] = []
    for row in rows:
        image = open_image(row["image"], f"row {row['id']}, field image")
        mask = None if row.get("mask") is None else open_image(row["mask"], f"row {row['id']}, field mask", mode="1")
        question = row["question"].split("\n", 1)[0]  # options and instructions stand on lines of their own
        asked = prompt(row)
        attended = {name: attend(*pair, image, question, prompt=asked) for name, pair in models.items()}
        peak = _peak(attended.values())
        stem = file_name(row["id"])
        picture = output / f"{stem}.png"
        save_image(image if mask is None else outline(image, mask), picture)
        drawn: list[Panel] = []
        for name, result in attended.items():
            looks: list[Look] = []
            for kind, layers in result.looks.items():
                path = output / f"{stem}-{file_name(name)}-{kind}.png"
                save_image(overlay(image, result.maps[layers].mean(0), peak, mask), path)
                title = f"layer {result.layers[0]}" if kind == "first" else kind
                mass = None if mask is None else in_mask_mass(result, mask, layers)
                looks.append({"title": title, "in_mask_mass": mass, "overlay": str(path)})
            right = correct(row, result.answer)
            drawn.append({"title": name, "answer": result.answer, "correct": right, "looks": looks})
        examples.append(
            {
                "id": row["id"],
                "question": question,
                "answer": row["answer"],
                "image": str(picture),
                "peak": peak,
                "panels": drawn,
            }
        )
    return examples


def run_verb(arguments: argparse.Namespace) -> None:
    """`agevlm analyze attention`, with the arguments of `cli.py`."""
    image = open_image(arguments.image, arguments.image)
    mask = None if arguments.mask is None else open_image(arguments.mask, arguments.mask, mode="1")
    names = unique_names(arguments.models)
    loaded = [load(path, trust_remote_code=arguments.trust_remote_code) for path in arguments.models]
    summary = write_attention(
        dict(zip(names, loaded, strict=True)),
        image,
        arguments.question,
        arguments.output,
        mask,
        layers=arguments.layers,
        max_new_tokens=arguments.max_new_tokens,
        phrases=arguments.phrases,
    )
    for name, result in summary["models"].items():
        print(f"{name}: {result['answer']}")
        shares = ", ".join(f"{100 * mass:.0f} %" for mass in result["image_mass"])
        layers = ", ".join(map(str, result["layers"]))
        inside = f"; in-mask attention mass {result['in_mask_mass']:.3f}" if mask is not None else ""
        print(f"  layer {layers}: {shares} of the question's attention on the picture{inside}")
    written(arguments.output)
