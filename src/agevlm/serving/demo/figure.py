"""An answer as HTML: words of the question, tokens of the answer, and the picture under the attention of the one that
the pointer is on.

Every map is in the page from the start, a small translucent picture each, so following the pointer and changing the
layer ask the server nothing; `figure.js` only chooses which one is seen. A layer's maps, the question's and every
token's, share one color scale, which is written below: maps of another layer or model have their own.
"""

import re
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
SCRIPT = files(__package__).joinpath("figure.js").read_text(encoding="utf-8")
_BAR = data_address(heat_layer(np.linspace(0, 1, 64)[None], 1, (64, 1)), "webp", 90)
STYLE = files(__package__).joinpath("figure.css").read_text(encoding="utf-8").replace("SCALE", _BAR)


def growing(name: str, text: str) -> str:
    """An answer that is not complete yet."""
    caption = f"<figcaption>{escape(name)}</figcaption>"
    return f'<figure class="answer">{caption}<p class="text">{escape(text)}…</p></figure>'


def _layer_name(layer: str, attended: Attended) -> str:
    """As in the list of layers; in self-attention with the part of the question's look that is on the picture."""
    if layer == MEAN:
        return "mean of all"
    mass = attended.image_mass[attended.layers.index(int(layer))]
    return layer if mass > 0.9995 else f"{layer} ({100 * mass:.0f} % on the picture)"


def _special(token: str, answer: str) -> str:
    """The class of a token that is no part of the answer's text, such as its end."""
    return "" if token.strip() in answer else " special"


def _span(key: str, content: str, kind: str = "") -> str:
    """What the pointer can be on: HTML whose map is that of `key`."""
    return f'<span class="token{kind}" tabindex="0" data-token="{key}">{content}</span>'


def finished(name: str, image: Image.Image, attended: Attended, first: str) -> str:
    """The complete answer.

    Args:
        first: the layer shown at first, an index as text or `MEAN`.
    """
    words = {f"{QUESTION} {word.start()}": word for word in re.finditer(r"\S+", attended.question)}
    tokens = {str(index): token for index, token in enumerate(attended.tokens)}
    cells = attended.cells.shrunk(HEAT_SIDE)
    heats, peaks = [], {}
    # (layer, question, its words and tokens, visual tokens)
    parts = [attended.part(word[0], word.start()) for word in words.values()]
    weights = np.concatenate([np.stack([attended.weights, *parts], axis=1), attended.token_weights], axis=1)
    layers = {str(layer): weights[index] for index, layer in enumerate(attended.layers)}
    if len(layers) > 1:
        layers[MEAN] = weights.mean(0)
    for layer, rows in layers.items():
        maps = [cells.to_pixels(row) for row in rows]
        peaks[layer] = peak_of(maps)
        for token, heat in zip((QUESTION, *words, *tokens), maps, strict=True):
            source = data_address(heat_layer(heat, peaks[layer], (heat.shape[1], heat.shape[0])), "webp", 60)
            heats.append(f'<img class="heat" data-token="{token}" data-layer="{layer}" alt="" src="{source}">')
    options = "".join(
        f'<option value="{layer}" data-peak="{peak:.1f}"{" selected" if layer == first else ""}>'
        f"{_layer_name(layer, attended)}</option>"
        for layer, peak in peaks.items()
    )
    asked = re.sub(r"\S+", lambda word: _span(f"{QUESTION} {word.start()}", escape(word[0])), attended.question)
    spans = "".join(_span(key, escape(token), _special(token, attended.answer)) for key, token in tokens.items())
    picture = data_address(image, "jpeg", 85, PICTURE_SIDE)
    return (
        f'<figure class="answer" data-done><figcaption>{escape(name)}</figcaption>'
        f'<p class="text">{_span(QUESTION, asked, " asked")}</p><p class="text tokens">{spans}</p>'
        f'<div class="stage" style="--ratio: {image.width / image.height:.4f}">'
        f'<img class="picture" alt="the picture" src="{picture}">'
        f'{"".join(heats)}</div><p class="layers"><label>layer <select>{options}</select></label> '
        '<span class="scale">0 <span class="colors"></span> <span class="peak"></span> × an even spread</span>'
        "</p></figure>"
    )
