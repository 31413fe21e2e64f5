"""The processor of AGE-VLM: text and row-aligned pictures to tensors, and the guidance of a row onto tokens and grid.

One `<|image|>` placeholder marks the place of each picture; it stays one token, because the visual tokens never enter
the text (paper section 3.2.1). Besides the usual tensors the model gets, for every batch with a picture:
- `image_mask (B, N)`: which of the N places of a row hold a picture;
- `visual_token_mask (B, N, L)`: which cells show picture, not padding;
- `cross_attention_mask (B, T, N)`: token t sees image n once its placeholder has come.
And on request, for the guidance loss (section 3.2.2): `guidance_query_mask (B, P, T)`, the tokens of each phrase of a
row, and `guidance_mask (B, P, N, L)`, their masks on the visual grid; without the axis P where a row has one query.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .compatibility_agevlm import MINIMUM  # noqa: F401 - says which transformers is needed


# isort: split
import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, get_image_size, is_valid_image
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .image_processing_agevlm import orientation


MARK = "\ufdd0"  # a character that Unicode keeps out of texts
# Keyword arguments that hold others (transformers' convention)
GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")


class AgeVlmProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}  # noqa: RUF012 - the attribute transformers reads


class AgeVlmProcessor(ProcessorMixin):
    """Joins [`AgeVlmImageProcessor`] and a tokenizer that has the image placeholder as one token."""

    valid_processor_kwargs = AgeVlmProcessorKwargs

    def __init__(
        self, image_processor=None, tokenizer=None, chat_template=None, image_token: str = "<|image|>", **kwargs
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer has no token '{image_token}'. Use `agevlm.processing.build.build_processor`, which "
                "renames a reserved special token to it."
            )
        # What a loaded file says of other code does not travel on.
        tokenizer.init_kwargs.pop("auto_map", None)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return [
            *self.tokenizer.model_input_names,
            "pixel_values",
            "image_mask",
            "visual_token_mask",
            "cross_attention_mask",
        ]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        guidance_spans: Sequence[tuple[int, int] | list[tuple[int, int]] | None] | None = None,
        guidance_masks: Sequence[Image.Image | list[Image.Image] | None] | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Tensors for a batch of rows.

        Args:
            images: pictures, one list per row (`[]` for a text-only row), or a flat list in the order of the
                placeholders.
            text: one string per row, with one `<|image|>` per picture. A string that starts with the tokenizer's
                beginning-of-text token, as the chat template writes it, gets no second one.
            guidance_spans: per row, the characters (start, end) of the query in its text, or None. Every token that
                holds one of them is selected, special tokens never.
            guidance_masks: per row, the mask of its first picture at original size, or None. A list of spans and one
                of as many masks guide a row phrase by phrase; the tensors then have an axis of phrases.
            **kwargs: of the tokenizer and the image processor.

        Raises:
            ValueError: placeholders and pictures of a row do not fit; a guided row has no picture, a mask of another
                size, a span outside its text, or another geometry than the image processor's; only some of the texts
                start with the beginning-of-text token. The message names the row.
        """
        if text is None:
            return super().__call__(images=images, **kwargs)
        kwargs = {name: dict(value or {}) if name in GROUPS else value for name, value in kwargs.items()}
        text = [text] if isinstance(text, str) else list(text)
        images = _rows_of_images(images, text, self.image_token)
        if {**kwargs.get("text_kwargs", {}), **kwargs}.get("add_special_tokens") is None:
            kwargs["add_special_tokens"] = not self._have_special_tokens(text)
        return_tensors = _taken(kwargs, "return_tensors")
        return_offsets = _taken(kwargs, "return_offsets_mapping")
        if guidance_spans is not None:
            moved = {"geometry", "size", "cell_size"} & {*kwargs, *kwargs.get("images_kwargs", ())}
            if moved:
                raise ValueError(
                    f"`{min(moved)}` of one call moves its pictures but not their guidance masks. Set it on the image "
                    "processor."
                )
            images = [self.image_processor.fetch_images(row) for row in images]  # files are opened, to know their size
        flat = [image for row in images for image in row]
        features = super().__call__(
            images=flat or None, text=text, return_offsets_mapping=True, return_tensors=None, **kwargs
        )
        data = dict(features)
        offsets = data["offset_mapping"] if return_offsets else data.pop("offset_mapping")
        if flat:
            data |= self._align(data, [len(row) for row in images])
        if guidance_spans is not None:
            # Only now: the pictures have passed the guards of the image processor.
            guided = _guided_rows(guidance_spans, guidance_masks, text, images)
            guidance = self._guidance(data, offsets, guided)
            by_phrase = any(isinstance(span, list) and not _is_span(span) for span in guidance_spans)
            data |= guidance if by_phrase else {name: value[:, 0] for name, value in guidance.items()}
        no_tensors = [*self.skip_tensor_conversion, "offset_mapping"]
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=no_tensors)

    def _have_special_tokens(self, text: list[str]) -> bool:
        """Whether the texts bring their beginning-of-text token along, so that the tokenizer must not add one."""
        bos = self.tokenizer.bos_token
        starts = [bos is not None and sample.startswith(bos) for sample in text]
        if len(set(starts)) > 1:
            raise ValueError(
                f"Row {starts.index(True)} starts with '{bos}' and row {starts.index(False)} does not. Render all "
                "rows with the chat template, or none, or say `add_special_tokens` yourself."
            )
        return all(starts)

    def _align(self, data: dict[str, Any], counts: list[int]) -> dict[str, Any]:
        """The flat pictures and their cells, packed into rows of the same number of places."""
        places = max(counts)
        image_mask = np.arange(places) < np.asarray(counts)[:, None]
        aligned = {
            "pixel_values": _packed(data["pixel_values"], image_mask),
            "image_mask": image_mask,
            "visual_token_mask": _packed(data["visual_token_mask"], image_mask),
        }
        lengths = {len(ids) for ids in data["input_ids"]}
        if len(lengths) == 1:  # ragged token lists (no padding asked for) cannot carry a mask per token
            ids = np.asarray(data["input_ids"])
            seen = (ids == self.image_token_id).cumsum(1)
            attended = np.asarray(data.get("attention_mask", np.ones_like(ids)), dtype=bool)
            aligned["cross_attention_mask"] = (seen[..., None] > np.arange(places)) & attended[..., None]
        return aligned

    def _guidance(
        self,
        data: dict[str, Any],
        offsets: Sequence[Sequence[tuple[int, int]]],
        guided: dict[int, list[tuple[tuple[int, int], Image.Image | np.ndarray]]],
    ) -> dict[str, np.ndarray]:
        """Query tokens and grid masks of the rows' phrases, zeros for the others; nothing where no row is guided."""
        if not guided:
            return {}
        if len({len(row) for row in offsets}) > 1:
            raise ValueError("Guidance needs rows of one length. Leave `padding` on.")
        phrases = max(map(len, guided.values()))
        query_mask = np.zeros((len(offsets), phrases, len(offsets[0])), dtype=bool)
        rows, *grid = np.shape(data["visual_token_mask"])
        grid_mask = np.zeros((rows, phrases, *grid), dtype=np.float32)
        # A query may hold the placeholder, or spell out another special token: they ask for nothing.
        special = [index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        words = ~np.isin(np.asarray(data["input_ids"]), special)
        for row, number, (span, mask) in ((row, *item) for row, pairs in guided.items() for item in enumerate(pairs)):
            cells = self.image_processor.mask_to_grid(mask)
            if not cells.any():
                continue  # the geometry `crop` has cut the object away: nothing to look at
            grid_mask[row, number, 0] = cells.reshape(-1)
            start, end = np.asarray(offsets[row]).T
            query_mask[row, number] = (start < span[1]) & (end > span[0]) & words[row]
        return {"guidance_query_mask": query_mask, "guidance_mask": grid_mask}

    def message_span(self, messages: Sequence[dict], message_index: int, query: str) -> tuple[int, int]:
        """Where `query` first stands in the content of one message: (start, end) in characters of the chat text.

        Raises:
            ValueError: the message does not contain the query.
        """
        marked, [(start, end)] = self.mark_phrases(messages[: message_index + 1], [(message_index, query, 0)])
        _, marks = take_marks(self.apply_chat_template(marked), 2)
        return marks[start], marks[end]

    def mark_phrases(
        self, messages: Sequence[dict], phrases: Sequence[tuple[int, str, int]]
    ) -> tuple[list[dict], list[tuple[int, int]]]:
        """The messages with `MARK` before and after the words of phrases, once where some meet, and for each phrase
        which of the marks are its two. `take_marks` takes them out of the text, so that one rendering gives both the
        text and the places.

        Marked is the content: a query like "user" or "image" is found neither in a header nor in a placeholder.

        Args:
            phrases: number of the message, words, and which of their occurrences is meant (0: the first).

        Raises:
            ValueError: a message does not contain the words (so often).
        """
        found = []
        for index, query, occurrence in phrases:
            searched = "".join(self._texts(messages[index]))
            if self.image_token not in query:
                searched = searched.replace(self.image_token, "\0" * len(self.image_token))
            start = -1
            for _ in range(occurrence + 1):
                start = searched.find(query, start + 1)
                if start < 0 or not query:
                    raise ValueError(
                        f"The query {query!r} does not occur in message {index}: {messages[index]['content']!r}"
                        f"{f' {occurrence + 1} times' if occurrence else ''}. The query must be a part of the "
                        "message it guides."
                    )
            found.append(((index, start), (index, start + len(query))))
        marked, starts = list(messages), {start for start, _ in found}
        places = sorted({place for pair in found for place in pair})
        for index, place in reversed(places):  # the last first: it moves nothing before it
            message, texts = marked[index], self._texts(marked[index])
            number, back = 0, (index, place) not in starts
            while place - back >= len(texts[number]):
                place -= len(texts[number])
                number += 1
            text = texts[number][:place] + MARK + texts[number][place:]
            if not isinstance(message["content"], str):
                parts = list(message["content"])
                parts[number] = {"type": "text", "text": text}
            marked[index] = {**message, "content": text if isinstance(message["content"], str) else parts}
        return marked, [(places.index(start), places.index(end)) for start, end in found]

    def _texts(self, message: dict) -> list[str]:
        """The text of each part of a message, that of a picture the placeholder."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [part["text"] if part["type"] == "text" else self.image_token for part in parts]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """One placeholder stays one token."""
        return self.image_token

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        ones = [1] * len(image_sizes)
        return MultiModalData(num_image_tokens=ones, num_image_patches=ones)

    def to_dict(self) -> dict[str, Any]:
        # `from_pretrained` drops the map that `save_pretrained` has set; it belongs to the class.
        return {**super().to_dict(), "auto_map": {"AutoProcessor": "processing_agevlm.AgeVlmProcessor"}}


def take_marks(text: str, number: int) -> tuple[str, list[int]]:
    """A text without its `MARK`s, and in its characters the place of each.

    Raises:
        ValueError: not `number` of them.
    """
    pieces = text.split(MARK)
    if len(pieces) != number + 1:
        raise ValueError(f"The text holds {MARK!r} {len(pieces) - number - 1} times, which no text may. Remove it.")
    return "".join(pieces), list(accumulate(map(len, pieces[:-1])))


def _taken(kwargs: dict[str, Any], name: str) -> Any:
    """Takes an argument out of keyword arguments, whether it stands there itself or in one of their groups."""
    groups = [kwargs, *(kwargs[group] for group in GROUPS if group in kwargs)]
    values = [group.pop(name) for group in groups if name in group]
    return values[0] if values else None


def _packed(values, image_mask: np.ndarray):
    """`(n, ...)` into the marked places of `(rows, places, ...)`, the others zero; arrays of NumPy or torch."""
    shape = (*image_mask.shape, *values.shape[1:])
    if image_mask.all():
        return values.reshape(shape)  # pictures are large: no copy where no place is empty
    packed = np.zeros(shape, dtype=values.dtype) if isinstance(values, np.ndarray) else values.new_zeros(shape)
    packed[image_mask] = values
    return packed


def _rows_of_images(images, text: list[str], image_token: str) -> list[list]:
    """`images` as one list per row of text.

    Raises:
        ValueError: a row without its pictures or its placeholders.
    """
    wanted = [sample.count(image_token) for sample in text]
    if images is None:
        images = [[] for _ in text]
    elif is_valid_image(images) or isinstance(images, str):
        images = list(images) if getattr(images, "ndim", None) == 4 else [images]  # a batch in one array
    if not any(isinstance(row, (list, tuple)) for row in images):
        if len(images) == sum(wanted):
            flat = iter(images)
            return [[next(flat) for _ in range(count)] for count in wanted]
        images = [images] if len(text) == 1 else images
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    if len(rows) != len(text):
        missing = "text" if len(rows) > len(text) else "list of pictures"
        raise ValueError(
            f"Row {min(len(rows), len(text))} has no {missing}: {len(rows)} lists of pictures for {len(text)} texts "
            f"with {sum(wanted)} placeholders '{image_token}'. Give one list of pictures per text ([] for none): the "
            f"number of {image_token} tokens in the prompts should be the same as the number of images."
        )
    for index, (row, count) in enumerate(zip(rows, wanted, strict=True)):
        if len(row) != count:
            raise ValueError(
                f"Row {index} has {len(row)} picture(s) but {count} placeholder(s) '{image_token}' in its text. Put "
                "one placeholder where each picture belongs, or drop the pictures."
            )
    return rows


def _is_span(span) -> bool:
    """Whether this is one (start, end), not a list of them."""
    return len(span) == 2 and all(isinstance(place, int) for place in span)


def _guided_rows(spans, masks, text: list[str], images: list[list]) -> dict[int, list[tuple[tuple[int, int], Any]]]:
    """Row number -> a (span, mask) for each phrase, of the rows that have both.

    Raises:
        ValueError: not one span and one mask per row or phrase, or they do not fit the text or the first picture.
    """
    if masks is None or len(masks) != len(spans) or len(spans) != len(text):
        raise ValueError(
            f"{len(text)} rows need as many `guidance_spans` and `guidance_masks` (None where a row is not "
            f"guided), got {len(spans)} and {0 if masks is None else len(masks)}."
        )
    guided: dict[int, list[tuple[tuple[int, int], Any]]] = {}
    for row, (of_row, masks_of_row) in enumerate(zip(spans, masks, strict=True)):
        if of_row is None or masks_of_row is None or len(of_row) == 0:
            continue
        if _is_span(of_row):
            of_row, masks_of_row = [of_row], [masks_of_row]
        if not isinstance(masks_of_row, (tuple, list)) or len(masks_of_row) != len(of_row):
            count = len(masks_of_row) if isinstance(masks_of_row, (tuple, list)) else "one that is no list"
            raise ValueError(
                f"Row {row}: {len(of_row)} phrases in `guidance_spans` and {count} in `guidance_masks`. "
                "Give a list with one mask for each phrase."
            )
        guided[row] = list(zip(of_row, masks_of_row, strict=True))
    for row, ((start, end), mask) in ((row, phrase) for row, phrases in guided.items() for phrase in phrases):
        if not images[row]:
            raise ValueError(f"Row {row} is guided but has no picture. Give it one, or None as span and mask.")
        if not 0 <= start < end <= len(text[row]):
            raise ValueError(
                f"Row {row}: the `guidance_spans` entry ({start}, {end}) is no part of its text of {len(text[row])} "
                "characters. Take it from `message_span` of the same messages."
            )
        height, width = _upright_size(mask)
        shown_height, shown_width = _upright_size(images[row][0])
        if (height, width) != (shown_height, shown_width):
            raise ValueError(
                f"Row {row}: the mask is {width} x {height} but its first picture is {shown_width} x {shown_height}. "
                "Give the mask at the picture's original size."
            )
    return guided


def _upright_size(image) -> tuple[int, int]:
    """(height, width) of a mask or a picture, after its rotation tag."""
    if not isinstance(image, Image.Image):
        return tuple(image.shape) if image.ndim == 2 else get_image_size(image)
    turned = orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


AgeVlmProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["AgeVlmProcessor"]
