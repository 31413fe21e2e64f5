"""Language ability: how well a vision-language model predicts text that it is given without a picture.

Perplexity is of tokens: it compares models with one tokenizer, such as a model before and after a stage. Bits per byte
compare any two models.
"""

import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from agevlm.data.scenes.build import load_told
from agevlm.data.tables import check_columns, load_table
from agevlm.models import render
from agevlm.store import digest, read_text


WINDOW = 512  # tokens of a long text that are predicted from each other
BATCH_TOKENS = 2048  # at once: their logits are as many times the vocabulary, in float32
MOST_CHARACTERS = 1_000_000
TOLD = 200  # questions of a folder of scenes


@dataclass(frozen=True)
class HeldText:
    """Text that nothing was trained on.

    Args:
        name: without the place of its file.
        texts: pairs of what is given and what is predicted.
    """

    name: str
    texts: tuple[tuple[str, str], ...]

    @property
    def stated(self) -> dict[str, Any]:
        """The inputs of a measurement other than the model, JSON-ready."""
        return {"text": self.name, "digest": digest("\0".join(map("\0".join, self.texts))), "window": WINDOW}


def read_held_text(place: str | Path, processor: Any) -> HeldText:
    """The first million characters of a held text.

    Args:
        place: a file of text; a Parquet file, or a set of the Hub (`ID` or `ID:CONFIG`, its split `test` where there
            is one), whose column `text` is joined with empty lines; or a folder of scenes: the answers to 200
            questions about scenes in words, of color and name pairs that no training row shows.
        processor: of the model, in whose chat format the questions are given.

    Raises:
        ValueError: nothing of that name, no text in it, or a file that is not UTF-8.
    """
    path = Path(place)
    if (path / "scenes.json").is_file():
        rows, start = load_told(path, "composition"), processor.tokenizer.bos_token or ""
        texts = [
            (render(processor, row["question"], pictures=0).removeprefix(start), row["answer"])
            for row in rows.select(range(min(TOLD, len(rows))))
        ]
    else:
        texts = [("", _read(place)[:MOST_CHARACTERS])]
    if not any(predicted.strip() for _, predicted in texts):
        raise ValueError(f"{place} holds no text; give another file or data set")
    return HeldText(path.name if path.exists() else str(place), tuple(texts))


def _read(place: str | Path) -> str:
    path = Path(place)
    if path.is_file() and path.suffix != ".parquet":
        return read_text(path)
    name, _, config = (str(place), "", "") if path.exists() else str(place).partition(":")
    rows = load_table(name, config=config or None, usual=("test", "validation", "train"))
    check_columns(place, rows.column_names, ["text"])
    return "\n\n".join(rows["text"])


def perplexity(model: Any, tokenizer: Any, held: HeldText) -> dict[str, Any]:
    """How well `model` predicts a text: `perplexity`, `bits_per_byte`, and the `tokens` and `bytes` predicted.

    A token is predicted once, from those before it in its window; windows begin with the tokenizer's bos (else eos).

    Args:
        model: takes `input_ids` and `attention_mask` (int64, batch x time) and returns `logits` (batch, time,
            vocabulary). It draws nothing at random, and its mode stays.

    Raises:
        ValueError: the tokenizer has no token to begin a window with.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token to begin a window with; set one")
    windows = []  # tokens, and how many of them are given
    for given, predicted in held.texts:
        before, tokens = (
            tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (given, predicted)
        )
        for place in range(0, len(tokens), WINDOW):
            windows.append(([start, *before, *tokens[place : place + WINDOW]], 1 + len(before)))
    device, was_training, total = model.device, model.training, 0.0
    model.eval()
    # Windows of one length at once: padding would leave its trace in the last digits
    for length, group in groupby(sorted(windows, key=lambda window: len(window[0])), lambda window: len(window[0])):
        ids, givens = (torch.tensor(column) for column in zip(*group, strict=True))
        places, size = torch.arange(1, length), max(1, BATCH_TOKENS // length)
        for batch, first in zip(ids.split(size), givens.split(size), strict=True):
            losses = _losses(model, batch.to(device)).cpu().double()
            total += losses[places >= first[:, None]].sum().item()
    model.train(was_training)
    number = sum(len(window) - given for window, given in windows)
    size = sum(len(predicted.encode()) for _, predicted in held.texts)
    return {
        "perplexity": torch.tensor(total / number, dtype=torch.float64).exp().item(),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": number,
        "bytes": size,
    }


@torch.no_grad()
def _losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihoods of tokens 1 to T - 1 of `ids` (batch, T): float32 (batch, T - 1)."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1)
