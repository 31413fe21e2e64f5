"""An answer as HTML: words of the question, tokens of the answer, and the pictures under the attention of the one that
the pointer is on.

Every map is in the page from the start, a small translucent picture each, so following the pointer, changing the layer
and saving a map ask the server nothing; `figure.js` only chooses which one is seen. In a layer the question has a
color scale of its own, its words share one, and so do the answer's tokens: a single token may look at one cell alone,
on whose scale the question would be pale. The scale of what is seen is written below.
"""

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image

from agevlm.analysis.attention import Attended
from agevlm.drawing import heat_layer, peak_of
from agevlm.images import data_address


PICTURE_SIDE = 768  # pixels at most
HEAT_SIDE = 160  # pixels at most; browsers enlarge it smoothly
QUESTION = "question"
MEAN = "mean"
STYLE = files(__package__).joinpath("figure.css").read_text(encoding="utf-8")
SCRIPT = files(__package__).joinpath("figure.js").read_text(encoding="utf-8")
_BAR = data_address(heat_layer(np.linspace(0, 1, 64)[None], 1, (64, 1)), "webp", 90)


def growing(name: str, before: Sequence[tuple[str, str]], question: str, text: str) -> str:
    """An answer that is not complete yet, below the conversation so far."""
    asked, answer = f'<p class="text asked">{escape(question)}</p>', f'<p class="text">{escape(text)}…</p>'
    return _figure(name, before, asked + answer)


def _figure(name: str, before: Sequence[tuple[str, str]], content: str, kind: str = "") -> str:
    earlier = "".join(
        f'<p class="text asked">{escape(question)}</p><p class="text">{escape(answer)}</p>'
        for question, answer in before
    )
    turns = f'<div class="earlier">{earlier}</div>' if earlier else ""
    return f'<figure class="answer"{kind}><figcaption>{escape(name)}</figcaption>{turns}{content}</figure>'


def _layer_name(layer: str, attended: Attended) -> str:
    """As in the list of layers; in self-attention with the part of the question's look that is on the pictures."""
    if layer == MEAN:
        return "mean of all"
    mass = attended.image_mass[attended.layers.index(int(layer))]
    return layer if mass > 0.9995 else f"{layer} ({100 * mass:.0f} % on the picture)"


def _span(key: str, content: str) -> str:
    """What the pointer can be on: HTML whose map is that of `key`."""
    return f'<span class="token" tabindex="0" data-token="{key}">{content}</span>'


def finished(
    name: str, images: Sequence[Image.Image], attended: Attended, first: str, before: Sequence[tuple[str, str]] = ()
) -> str:
    """The complete answer, below the conversation so far.

    Args:
        first: the layer shown at first, an index as text or `MEAN`.
    """
    words = {f"{QUESTION} {word.start()}": word for word in re.finditer(r"\S+", attended.question)}
    said = [index for index, special in enumerate(attended.special) if not special]
    # (layer, question, its words and tokens, visual tokens)
    parts = [attended.part(word[0], word.start()) for word in words.values()]
    weights = np.concatenate([np.stack([attended.weights, *parts], axis=1), attended.token_weights[:, said]], axis=1)
    layers = {str(layer): weights[index] for index, layer in enumerate(attended.layers)}
    if len(layers) > 1:
        layers[MEAN] = weights.mean(0)
    heats: list[list[str]] = [[] for _ in images]
    for layer, rows in layers.items():
        maps = dict(zip((QUESTION, *words, *said), (attended.spread(row, HEAT_SIDE) for row in rows), strict=True))
        for keys in ([QUESTION], words, said):
            peak = peak_of(heat for key in keys for heat in maps[key])
            for key in keys:
                for place, heat in enumerate(maps[key]):
                    source = data_address(heat_layer(heat, peak, (heat.shape[1], heat.shape[0])), "webp", 60)
                    heats[place].append(
                        f'<img class="heat" data-token="{key}" data-layer="{layer}" data-peak="{peak:.1f}" alt="" '
                        f'src="{source}">'
                    )
    options = "".join(
        f'<option value="{layer}"{" selected" if layer == first else ""}>{_layer_name(layer, attended)}</option>'
        for layer in layers
    )
    asked = re.sub(r"\S+", lambda word: _span(f"{QUESTION} {word.start()}", escape(word[0])), attended.question)
    spans = "".join(_span(str(index), escape(attended.tokens[index])) for index in said) or "(it says nothing)"
    stages = "".join(
        f'<div class="stage" style="--ratio: {image.width / image.height:.4f}"><img class="picture" '
        f'alt="picture {place}" src="{data_address(image, "jpeg", 85, PICTURE_SIDE)}">{"".join(drawn)}</div>'
        for place, (image, drawn) in enumerate(zip(images, heats, strict=True), 1)
    )
    return _figure(
        name,
        before,
        f'<p class="text asked"><span class="token" tabindex="0" data-token="{QUESTION}">{asked}</span></p>'
        f'<p class="text tokens">{spans}</p><div class="stages">{stages}</div>'
        f'<p class="layers"><label>layer <select>{options}</select></label> <span class="scale">0 <img class="colors" '
        f'alt="from no attention to the most" src="{_BAR}"> <span class="peak"></span> × an even spread</span>'
        '<button class="save" type="button">Save this map</button></p>',
        " data-done",
    )
