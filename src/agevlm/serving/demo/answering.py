"""Answers as they come, of several models at once, and the attention behind every token when they are complete.

Attention is recorded by `agevlm.analysis.recording` while `generate` runs, one prompt at a time per model: a lock per
model keeps users apart. What belongs to a request lives in its own objects only.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from PIL import Image
from transformers import TextStreamer

from agevlm.analysis.attention import LAYERS_DRAWN, Attended, attend
from agevlm.analysis.subjects import Subject


MAX_QUESTION = 2_000  # characters


@dataclass(frozen=True)
class Answerer:
    """A model that answers one question at a time."""

    subject: Subject
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def layers(self) -> list[int]:
        """All cross layers; of a concatenating model the first layer, which the paper shows, and some more."""
        known = list(self.subject.attention)
        return [known[round(index)] for index in np.linspace(0, len(known) - 1, min(len(known), LAYERS_DRAWN))]


class _ToQueue(TextStreamer):
    """Puts `(name, text so far)` whenever a word is complete."""

    def __init__(self, tokenizer, name: str, events: queue.Queue):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.name, self.events, self.text = name, events, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.events.put((self.name, self.text))


def ask(
    answerers: Mapping[str, Answerer],
    images: Sequence[Image.Image],
    question: str,
    max_new_tokens: int,
    before: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType({}),
) -> Iterator[dict[str, str | Attended]]:
    """The state of every answer, again whenever one has grown: its text so far, at last the whole with its attention.

    Args:
        before: of each model the questions and its answers that come before.

    Raises:
        ValueError: a question that is empty or longer than `MAX_QUESTION`, or what `attend` raises.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something about the picture")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"the question has {len(question)} characters; ask in {MAX_QUESTION} or fewer")
    events: queue.Queue = queue.Queue()

    def work(name: str, answerer: Answerer) -> None:
        model, processor = answerer.subject.model, answerer.subject.processor
        try:
            streamer = _ToQueue(processor.tokenizer, name, events)
            with answerer.lock:
                done = attend(
                    model,
                    processor,
                    images,
                    question,
                    before=before.get(name, ()),
                    layers=answerer.layers,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                )
            events.put((name, done))
        except Exception as error:  # raised again where the user waits
            events.put((name, error))

    for name, answerer in answerers.items():
        threading.Thread(target=work, args=(name, answerer), daemon=True).start()
    state: dict[str, str | Attended] = dict.fromkeys(answerers, "")
    while not all(isinstance(value, Attended) for value in state.values()):
        name, value = events.get()
        if isinstance(value, Exception):
            raise value
        state[name] = value
        yield dict(state)
