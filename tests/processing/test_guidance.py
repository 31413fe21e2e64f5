"""Guidance of a row onto tokens and grid: the query's tokens, the mask's cells, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from builders import CHAT, IMAGE, IMAGE_KEYS, QUESTION, TEXT_KEYS, mask, picture, tiny_processor


def selected(processor, batch, row: int = 0) -> str:
    return processor.tokenizer.decode(batch["input_ids"][row][batch["guidance_query_mask"][row]])


WORDS = ["Is", "a", "red", "apple", "image", "user", "Yes", "No,", "eot_id", "grün", "木", "cars.", "|>", "<|"]


@settings(max_examples=80, deadline=None, database=None)
@given(
    words=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), min_size=1, max_size=4),
    place=st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)),
    side=st.sampled_from(["left", "right"]),
)
def test_the_selected_tokens_are_the_query(words, place, side):
    """For a query of whole words anywhere in a conversation, also words that headers and placeholders hold."""
    processor = tiny_processor()
    messages = [
        {"role": "assistant" if turn % 2 else "user", "content": " ".join(turn_words)}
        for turn, turn_words in enumerate(words)
    ]
    index = place[0] % len(messages)
    start = place[1] % len(words[index])
    query = " ".join(words[index][start : start + 1 + place[2] % (len(words[index]) - start)])
    messages[0]["content"] = IMAGE + messages[0]["content"]
    span = processor.message_span(messages, index, query)
    text = processor.apply_chat_template(messages)
    assert text[slice(*span)] == query
    header = processor.apply_chat_template([*messages[:index], {"role": messages[index]["role"], "content": ""}])
    content_start = len(header) - len("<|eot_id|>")
    content_end = content_start + len(messages[index]["content"])
    assert content_start + len(IMAGE) * (index == 0) <= span[0] and span[1] <= content_end
    batch = processor(
        images=[[], [picture()]],
        text=["A blue car and a green tree on the left of a yellow house. " * 3, text],
        guidance_spans=[None, span],
        guidance_masks=[None, mask()],
        add_special_tokens=False,
        padding_side=side,
        return_tensors="pt",
    )
    assert query in selected(processor, batch, 1)
    assert selected(processor, batch, 1).strip() == query or not_at_token_borders(processor, text, span)
    assert not batch["guidance_query_mask"][0].any() and not batch["guidance_mask"][0].any()


def not_at_token_borders(processor, text: str, span: tuple[int, int]) -> bool:
    """Whether a token holds characters of the query and of its neighbourhood, as in "cars.|>"."""
    offsets = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return any(start < edge < end for start, end in offsets for edge in span)


def test_guidance_tensors(processor):
    texts = [f"{IMAGE}{QUESTION}", f"{IMAGE}{IMAGE}{QUESTION}", "text alone"]
    start = len(IMAGE) + QUESTION.index("red apple")
    batch = processor(
        images=[[picture()], [picture(), picture()], []],
        text=texts,
        guidance_spans=[(start, start + len("red apple")), None, None],
        guidance_masks=[mask(box=(0, 0, 30, 60)), mask(), None],
        return_tensors="pt",
    )
    assert batch["guidance_query_mask"].dtype == torch.bool
    assert batch["guidance_mask"].dtype == torch.float32
    assert batch["guidance_query_mask"].shape == batch["input_ids"].shape
    assert batch["guidance_mask"].shape == batch["visual_token_mask"].shape
    assert selected(processor, batch) == " red apple"
    assert batch["guidance_mask"][0, 0].view(3, 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert not batch["guidance_mask"][0, 1].any()
    assert not batch["guidance_query_mask"][1:].any() and not batch["guidance_mask"][1:].any()


def test_batches_in_which_no_row_is_guided_carry_no_guidance(processor):
    for spans, masks in (([None], [None]), ([(0, 3)], [None]), ([None], [mask()])):
        batch = processor(
            images=[[picture()]], text=[f"{IMAGE}Yes"], guidance_spans=spans, guidance_masks=masks, return_tensors="pt"
        )
        assert set(batch) == TEXT_KEYS | IMAGE_KEYS


def test_an_object_that_crop_cuts_away_leaves_the_row_unguided():
    processor = tiny_processor(geometry="crop")
    batch = processor(
        images=[[picture(300, 96)], [picture(300, 96)]],
        text=[f"{IMAGE}Yes"] * 2,
        guidance_spans=[(len(IMAGE), len(IMAGE) + 3)] * 2,
        guidance_masks=[mask(300, 96, box=(0, 0, 50, 96)), mask(300, 96, box=(150, 0, 200, 96))],
        return_tensors="pt",
    )
    assert batch["guidance_mask"].flatten(1).any(1).tolist() == [False, True]
    assert batch["guidance_query_mask"].any(1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("spans", "masks", "message"),
    [
        ([(9, 12)], [mask()], "2 rows need as many `guidance_spans` and `guidance_masks`.*got 1 and 1"),
        ([(9, 12), None], None, "2 rows need as many.*got 2 and 0"),
        ([None, (0, 2)], [None, mask()], "Row 1 is guided but has no picture. Give it one, or None"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(processor, spans, masks, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[[picture()], []], text=[f"{IMAGE}Yes", "No"], guidance_spans=spans, guidance_masks=masks)
    with pytest.raises(ValueError, match="Row 0 is guided but has no picture"):  # nor has any other
        processor(text=["Yes"], guidance_spans=[(0, 3)], guidance_masks=[mask()])


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (5, 3), (10, 13), (900, 1200)])
def test_a_span_outside_its_text_is_refused(processor, span):
    with pytest.raises(ValueError, match=r"Row 0: the `guidance_spans` entry .* no part of its text of 12 char.*Take"):
        processor(images=[[picture()]], text=[f"{IMAGE}Yes"], guidance_spans=[span], guidance_masks=[mask()])
    processor(images=[[picture()]], text=[f"{IMAGE}Yes"], guidance_spans=[(9, 12)], guidance_masks=[mask()])


def kinds_of_pictures(image, tmp_path) -> dict:
    """The same picture as a user may give it, one of them stored on its side with a rotation tag."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    return {
        "Pillow": image,
        "array": np.asarray(image),
        "tensor": torch.tensor(np.asarray(image)).permute(2, 0, 1),
        "file": str(tmp_path / "turned.png"),
        "opened file": Image.open(tmp_path / "turned.png"),
    }


@pytest.mark.parametrize("as_array", [False, True])
def test_a_mask_of_another_size_is_refused(processor, tmp_path, as_array):
    for kind, image in kinds_of_pictures(picture(50, 30), tmp_path).items():
        for size, fits in (((50, 30), True), ((30, 50), False), ((100, 60), False)):
            drawn = mask(*size, box=(0, 0, 20, 20))
            given = {
                "images": [[], [image]],
                "text": ["No", f"{IMAGE}Yes"],
                "guidance_spans": [None, (9, 12)],
                "guidance_masks": [None, np.asarray(drawn) if as_array else drawn],
            }
            if fits:
                assert processor(**given)["guidance_mask"][1].any(), kind
                continue
            message = rf"Row 1: the mask is {size[0]} x {size[1]} but its first picture is 50 x 30. Give the mask at"
            with pytest.raises(ValueError, match=message):
                processor(**given)


def test_broken_files_are_refused_with_guidance_too(processor, tmp_path):
    picture(200, 200).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png cannot be decoded: .*Replace the file"):
        processor(
            images=[[str(tmp_path / "cut.png")]],
            text=[f"{IMAGE}Yes"],
            guidance_spans=[(9, 12)],
            guidance_masks=[mask(200, 200)],
        )


def test_a_mask_is_turned_as_its_picture_is(processor, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    mask(60, 40, box=(0, 0, 20, 10)).save(tmp_path / "mask.png", exif=exif)
    turned = Image.open(tmp_path / "mask.png")
    upright = mask(40, 60, box=(30, 0, 40, 20))
    grid_mask = processor(
        images=[[picture(40, 60)]] * 2,
        text=[IMAGE + QUESTION] * 2,
        guidance_spans=[(9, 20)] * 2,
        guidance_masks=[turned, upright],
        return_tensors="pt",
    )["guidance_mask"]
    assert grid_mask[1].any()
    assert torch.equal(grid_mask[0], grid_mask[1])


@pytest.mark.parametrize(
    "change", [{"geometry": "stretch"}, {"images_kwargs": {"geometry": "crop"}}, {"size": {"height": 64, "width": 64}}]
)
def test_a_geometry_that_masks_would_not_follow_is_refused(processor, change):
    inputs = {"images": [[picture(192, 96)]], "text": [IMAGE + QUESTION], **change}
    assert processor(**inputs)["visual_token_mask"].any()
    with pytest.raises(ValueError, match="of one call moves its pictures but not their guidance masks"):
        processor(**inputs, guidance_spans=[(9, 20)], guidance_masks=[mask(192, 96)])


def test_guidance_needs_rows_of_one_length(processor):
    given = {
        "images": [[picture()], []],
        "text": [f"{IMAGE}A blue car", "No"],
        "guidance_spans": [(9, 12), None],
        "guidance_masks": [mask(), None],
    }
    assert processor(**given)["guidance_query_mask"].any()
    with pytest.raises(ValueError, match=r"Guidance needs rows of one length. Leave `padding` on"):
        processor(**given, padding=False)


def test_special_tokens_are_never_selected(processor):
    query = f"Is <|eot_id|>a{IMAGE}red<|pad|> apple"
    messages = [{"role": "user", "content": query}]
    text = processor.apply_chat_template(messages)
    batch = processor(
        images=[[picture()]],
        text=[text],
        guidance_spans=[processor.message_span(messages, 0, query)],
        guidance_masks=[mask()],
        return_tensors="pt",
    )
    assert selected(processor, batch) == "Is ared apple"


def test_each_turn_has_its_own_span_where_the_same_question_comes_twice(processor):
    text = processor.apply_chat_template(CHAT)
    first, second = (processor.message_span(CHAT, index, QUESTION) for index in (1, 3))
    assert first == (text.index(QUESTION), text.index(QUESTION) + len(QUESTION))
    assert second == (text.rindex(QUESTION), text.rindex(QUESTION) + len(QUESTION))
    assert first != second
    odd = [{"role": "user", "content": "\0"}, *CHAT]  # whatever came before
    assert processor.apply_chat_template(odd)[slice(*processor.message_span(odd, 4, QUESTION))] == QUESTION
    # within one message, the first occurrence
    twice = [{"role": "user", "content": f"Yes Yes {IMAGE}"}]
    assert processor.message_span(twice, 0, "Yes")[0] == processor.apply_chat_template(twice).index("Yes")


@pytest.mark.parametrize("query", ["user", "image", "eot_id", "|", "end"])
def test_a_query_is_never_found_in_headers_and_placeholders(processor, query):
    messages = [{"role": "user", "content": f"{IMAGE} What does the {query} say?"}]
    text = processor.apply_chat_template(messages)
    expected = text.index("What does the ") + len("What does the ")
    assert processor.message_span(messages, 0, query) == (expected, expected + len(query))
    with pytest.raises(ValueError, match="does not occur in message 0"):
        processor.message_span([{"role": "user", "content": f"{IMAGE}What?"}], 0, query)


def test_queries_that_hold_the_placeholder_and_structured_content(processor):
    content = f"{IMAGE}What is it?"
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    span = processor.message_span([{"role": "user", "content": content}], 0, content)
    assert text[slice(*span)] == content
    batch = processor(
        images=[[picture()]], text=[text], guidance_spans=[span], guidance_masks=[mask()], return_tensors="pt"
    )
    assert selected(processor, batch) == "What is it?"  # a placeholder asks for nothing
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert text[slice(*processor.message_span([{"role": "user", "content": parts}], 0, "is it"))] == "is it"


def test_the_mark_of_a_query_may_be_in_no_text(processor):
    with pytest.raises(ValueError, match=r"The text holds '\\ufdd0' 1 times, which no text may"):
        processor.message_span([{"role": "user", "content": "Yes \ufdd0 No"}], 0, "Yes")


def test_a_query_may_reach_over_parts_and_leaves_the_messages_as_they_were(processor):
    parts = [{"type": "text", "text": "What"}, {"type": "image"}, {"type": "text", "text": "is it?"}]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages)
    for query in ("What", f"What{IMAGE}is", "is it?", IMAGE):
        assert text[slice(*processor.message_span(messages, 0, query))] == query
    assert messages == [{"role": "user", "content": parts}] and parts[1] == {"type": "image"}


@pytest.mark.parametrize("query", ["a green apple", ""])
def test_a_query_that_is_not_in_its_message_is_refused(processor, query):
    with pytest.raises(ValueError, match=r"query '.*' does not occur in message 1: .*must be a part of the message"):
        processor.message_span(CHAT, 1, query)
