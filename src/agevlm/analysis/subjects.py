"""A vision-language model under analysis, ours or one of transformers': inputs, layers, where its tokens stand.

Two kinds are told apart. A *concatenating* model (ConvLLaVA, MobileVLM-V2, SmolVLM, Qwen-VL) has its visual tokens
among the text's, and looks in self-attention. A *cross-attention* model (ours) looks in its cross blocks alone.
transformers' Mllama is refused: its pictures are tiled at several aspect ratios inside one cross-attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import nn

from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.models import encode, render


_MARK = "\ue000"  # of no text: stands for the prompt where its place is looked up


@dataclass(frozen=True)
class Encoded:
    """A left-padded batch and where its tokens stand.

    Attributes:
        inputs: what the model takes.
        text_BT: bool; tokens of the wanted span, without special tokens.
        places: of each row these tokens' characters in the span, (start, end).
        image_BT: bool; visual tokens; None for a cross-attention model.
    """

    inputs: dict[str, torch.Tensor]
    text_BT: torch.Tensor
    places: list[list[tuple[int, int]]]
    image_BT: torch.Tensor | None


@dataclass(frozen=True)
class Subject:
    """A model (in eval mode) and its processor."""

    model: Any
    processor: Any

    @cached_property
    def concatenates(self) -> bool:
        """Whether visual tokens stand among the text's.

        Raises:
            ValueError: it is neither such a model nor ours.
        """
        config = self.model.config
        if config.model_type == AgeVlmConfig.model_type:
            return False
        if config.model_type == "mllama" or image_token_id(config) is None:
            raise ValueError(
                f"a model of type {config.model_type!r} cannot be analysed: only AGE-VLM and models that have their "
                "visual tokens among the text's (with `image_token_id` in their configuration) are understood"
            )
        return True

    @cached_property
    def decoder(self) -> Any:
        """The text decoder, with `layers`."""
        return self.model.get_decoder() if self.concatenates else self.model.base_model.language_model

    @cached_property
    def attention(self) -> dict[int, nn.Module]:
        """Layer index -> the attention in which text looks at pictures: self-attention of a concatenating model, cross
        blocks of ours (numbered in the interleaved stack, section 3.2.2)."""
        if self.concatenates:
            found = {index: getattr(layer, "self_attn", None) for index, layer in enumerate(self.decoder.layers)}
            return {index: module for index, module in found.items() if module is not None}
        blocks = self.decoder.cross_attention_layers
        indices = self.model.config.cross_attention_layers
        return {index: block.cross_attn for index, block in zip(indices, blocks, strict=True)}

    def encode(
        self,
        images: Sequence[Image.Image | Sequence[Image.Image]],
        prompts: Sequence[str],
        spans: Sequence[str] | None = None,
        *,
        before: Sequence[tuple[str, str]] = (),
        answer_next: bool = False,
    ) -> Encoded:
        """One prompt per row, in the model's own chat format, behind the row's picture or pictures.

        Args:
            before: the questions and answers of every row that come before the prompt.
            spans: the part of each prompt whose tokens are wanted. Default: all of it.
            answer_next: end with the header of the answer.

        Raises:
            ValueError: no chat template or fast tokenizer; a prompt that is empty, holds the image placeholder or
                does not hold its span.
        """
        spans = prompts if spans is None else spans
        for prompt in prompts:
            self._check(prompt)
        counts = [1 if isinstance(image, Image.Image) else len(image) for image in images]
        asked = zip(prompts, counts, strict=True)
        texts = [render(self.processor, *row, before, answer_next=answer_next) for row in asked]
        starts = [render(self.processor, _MARK, count, before).index(_MARK) for count in counts]
        inputs = encode(self.model, self.processor, images, texts)
        text_BT, places = torch.zeros_like(inputs["input_ids"], dtype=torch.bool), []
        for row, (text, start, prompt, span) in enumerate(zip(texts, starts, prompts, spans, strict=True)):
            tail = text.rpartition(self.processor.image_token)[2]
            start -= len(text) - len(tail)
            chosen = self._span_tokens(tail, start, prompt, span, inputs["input_ids"][row].tolist())
            text_BT[row, -len(chosen) :] = torch.tensor([place is not None for place in chosen], device=text_BT.device)
            places.append([place for place in chosen if place is not None])
        image_BT = None
        if self.concatenates:
            token: Any = image_token_id(self.model.config)
            image_BT = inputs["input_ids"].eq(token)
            if not image_BT.any(-1).all():
                raise ValueError(
                    f"the processor writes no image token {token}; model and processor do not belong together"
                )
        return Encoded(inputs, text_BT, places, image_BT)

    def _check(self, prompt: str) -> None:
        if not prompt.strip():
            raise ValueError("the text is empty; ask or say something about the picture")
        placeholder = self.processor.image_token
        if placeholder in prompt:
            raise ValueError(f"the text {prompt!r} holds the image placeholder {placeholder}; leave it out")
        if not getattr(self.processor, "chat_template", None):
            raise ValueError("the processor has no chat template, so nothing says how to ask this model; give it one")

    def _span_tokens(
        self, tail: str, start: int, prompt: str, span: str, ids: list[int]
    ) -> list[tuple[int, int] | None]:
        """The characters in `span` of the last tokens of `ids`, those of the text `tail` behind the pictures; the
        prompt begins there at `start`. None for tokens beside the span."""
        tokenizer = self.processor.tokenizer
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} knows no character offsets; use a fast tokenizer")
        within = prompt.find(span)
        if start < 0 or not tail.startswith(prompt, start) or within < 0 or not span:
            raise ValueError(
                f"The query {span!r} does not occur in the prompt {prompt!r} behind the picture. It must be a part of "
                "what the model is asked, and the chat template must put the picture first."
            )
        start += within
        # Behind the placeholder, as in the whole prompt: some tokenizers write the beginning of a string differently.
        encoding = tokenizer(self.processor.image_token + tail, add_special_tokens=False, return_offsets_mapping=True)
        tail_ids, offsets = encoding["input_ids"][1:], encoding["offset_mapping"][1:]
        shift = len(self.processor.image_token)
        if ids[-len(tail_ids) :] != tail_ids:
            raise ValueError(f"the tokens of {tail!r} are not the last of the model's input; cannot find the question")
        special = set(tokenizer.all_special_ids)
        special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        low, high = start + shift, start + len(span) + shift
        return [
            (left - low, right - low) if left < high and right > low and token not in special else None
            for token, (left, right) in zip(tail_ids, offsets, strict=True)
        ]


def image_token_id(config: Any) -> int | None:
    """The visual token of a concatenating model's configuration, None if it has none."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if token is not None), None)
