"""The collator: labels on answers only, guidance of the right rows, and errors that name the row."""

import io
import pickle
import re
from collections import Counter

import jinja2
import pytest
import torch
from PIL import Image
from transformers.utils import chat_template_utils

from agevlm.training.collator import AgeVlmDataCollator, guided_phrases
from builders import IMAGE, IMAGE_KEYS, QUESTION, mask, picture, row, same, tiny_model, tiny_processor


GUIDANCE_KEYS = {"guidance_query_mask", "guidance_mask"}


@pytest.fixture(scope="module")
def collator():
    return AgeVlmDataCollator(tiny_processor())


def conversation(**changes) -> dict:
    """Two questions, a system turn, answers of different lengths."""
    messages = [
        {"role": "system", "content": "A house"},
        {"role": "user", "content": IMAGE + QUESTION},
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "Yes, a red apple on the left."},
    ]
    return {"id": "talk", "images": [picture(50, 30)], "messages": messages, "guidance": None, **changes}


def text_row(**changes) -> dict:
    return {**row("text", images=0), **changes}


def guide(base: dict, **changes) -> dict:
    width, height = base["images"][0].size
    guidance = {"query": "red apple", "message_index": 1, "mask": mask(width, height, box=(0, 0, 9, 9))}
    return {**base, "guidance": {**guidance, "source": "test", "score": 1.0, **changes}}


def encoded(image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def decode(collator, ids: torch.Tensor) -> str:
    return collator.processor.tokenizer.decode(ids)


def test_labels_are_the_answers_of_every_turn_with_their_end(collator):
    rows = [conversation(), row(), text_row()]
    batch = collator(rows)
    assert batch["labels"].dtype == torch.int64
    for index, one in enumerate(rows):
        learned = batch["labels"][index] != -100
        assert torch.equal(batch["labels"][index][learned], batch["input_ids"][index][learned])
        answers = [turn["content"] + "<|eot_id|>" for turn in one["messages"] if turn["role"] == "assistant"]
        assert decode(collator, batch["labels"][index][learned]) == "".join(answers)


def test_rows_are_padded_on_the_right_and_padding_is_not_learned(collator):
    rows = [conversation(), row(), text_row()]
    batch = collator(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"} | IMAGE_KEYS
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    for index, one in enumerate(rows):
        text = collator.processor.apply_chat_template(one["messages"])
        length = int(batch["attention_mask"][index].sum())
        assert batch["attention_mask"][index, :length].all()
        assert decode(collator, batch["input_ids"][index, :length]) == text
        assert (batch["labels"][index, length:] == -100).all()
        assert not batch["cross_attention_mask"][index, length:].any()
    assert batch["image_mask"].tolist() == [[True], [True], [False]]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_a_row_in_a_batch_is_what_it_is_alone(collator, order):
    rows = [guide(conversation()), text_row(), row(images=2), phrased(3)]
    rows = [rows[index] for index in order]
    batch = collator(rows)
    for index, one in enumerate(rows):
        alone = collator([one])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name][index, :length], alone[name][0]), name
        for name in ("pixel_values", "visual_token_mask"):
            if name in alone:
                assert torch.equal(batch[name][index, : len(alone[name][0])], alone[name][0]), name
        phrases, images = alone.get("guidance_mask", torch.zeros(1, 0, 1, 1)).shape[1:3]
        if phrases:
            assert torch.equal(batch["guidance_query_mask"][index, :phrases, :length], alone["guidance_query_mask"][0])
            assert torch.equal(batch["guidance_mask"][index, :phrases, :images], alone["guidance_mask"][0])
        if "guidance_mask" in batch:
            assert not batch["guidance_query_mask"][index, phrases:].any()
            assert not batch["guidance_mask"][index, phrases:].any()


def test_text_only_batches_have_neither_pictures_nor_guidance(collator):
    assert set(collator([text_row(), text_row()])) == {"input_ids", "attention_mask", "labels"}


def test_guidance_marks_the_query_of_guided_rows_only(collator):
    rows = [row(), guide(conversation()), guide(conversation(), message_index=3, query=QUESTION), text_row()]
    batch = collator(rows)
    assert set(batch) >= GUIDANCE_KEYS
    assert batch["guidance_query_mask"].dtype == torch.bool and batch["guidance_mask"].dtype == torch.float32
    assert batch["guidance_query_mask"].any(2).tolist() == [[False], [True], [True], [False]]
    assert batch["guidance_mask"].flatten(2).any(2).tolist() == [[False], [True], [True], [False]]
    first, second = (batch["input_ids"][index][batch["guidance_query_mask"][index, 0]] for index in (1, 2))
    assert decode(collator, first) == " red apple"
    assert decode(collator, second) == QUESTION
    # the question stands in both user turns; the guided one is the second
    text = collator.processor.apply_chat_template(rows[2]["messages"])
    before = collator.processor.tokenizer(text[: text.rindex(QUESTION)])["input_ids"]
    assert batch["guidance_query_mask"][2, 0].nonzero()[0].item() == len(before)
    assert not (batch["guidance_mask"][:, 0].bool() & ~batch["visual_token_mask"]).any()
    assert not set(collator([row(), text_row()])) & GUIDANCE_KEYS


def phrased(number: int) -> dict:
    """A conversation with so many phrases: some repeat words or masks, the last two overlap."""
    item = guide(conversation())
    words = [(4, "red apple", 0), (2, "No", 0), (3, "red apple", None), (1, "red apple", 0), (1, "red apple", 0),
             (4, "Yes", 0), (3, QUESTION, 0), (3, "apple", 0)]  # fmt: skip
    names = ("message_index", "query", "occurrence", "mask")
    changes = [
        dict(zip(names, (*phrase, mask(50, 30, box=(0, 0, 20 + 3 * n, 20))), strict=True))
        for n, phrase in enumerate(words[-number:])
    ]
    return {**item, "id": f"phrases-{number}", "guidance": [{**item["guidance"], **change} for change in changes]}


@pytest.mark.parametrize("number", [1, 3, 8])
def test_each_phrase_has_its_own_tokens_and_mask(collator, number):
    item = phrased(number)
    batch = collator([item, text_row(), row(guided=True)])
    assert batch["guidance_query_mask"].shape[:2] == batch["guidance_mask"].shape[:2] == (3, number)
    for place, phrase in enumerate(item["guidance"]):
        tokens = batch["input_ids"][0][batch["guidance_query_mask"][0, place]]
        assert decode(collator, tokens).strip() == phrase["query"].strip()
        cells = collator.processor.image_processor.mask_to_grid(phrase["mask"]).reshape(-1)
        assert batch["guidance_mask"][0, place, 0].bool().tolist() == cells.tolist()
    single = collator([{**item, "guidance": item["guidance"][-1]}])
    listed = collator([{**item, "guidance": item["guidance"][-1:]}])
    assert same(single, listed)  # one mask is the case of one phrase
    assert torch.equal(batch["labels"][0, : single["labels"].shape[1]], single["labels"][0])


def test_a_phrase_may_mean_a_later_occurrence(collator):
    item = row(guided=True)
    item["messages"] = [dict(item["messages"][0]), {"role": "assistant", "content": "Yes Yes Yes"}]
    phrase = {**item["guidance"], "message_index": 1, "query": "Yes"}
    item["guidance"] = [{**phrase, "occurrence": place} for place in (2, 0, 1)]
    query = collator([item])["guidance_query_mask"][0]
    first, second, third = (query[place].nonzero()[0].item() for place in (1, 2, 0))
    assert first < second < third and query.sum(0).max() == 1
    item["guidance"][0]["occurrence"] = 3
    with pytest.raises(ValueError, match=r"guidance\[0\].query 'Yes' is not in messages\[1\].* 4 times"):
        collator([item])
    item["guidance"] = [{**phrase, "message_index": 0, "query": "image", "occurrence": 1}]  # once, and in `<|image|>`
    with pytest.raises(ValueError, match=r"guidance\[0\].query 'image' is not in messages\[0\].* 2 times"):
        collator([item])


def test_phrases_that_are_cut_off_are_named_and_the_row_is_guided_by_the_others(collator):
    item = phrased(8)
    lenient = AgeVlmDataCollator(collator.processor, max_length=40, row_ids=True, strict=False)
    batch = lenient([item, row(guided=True)])
    guided = guided_phrases(batch)
    assert 0 < guided[0].sum() < 8 and guided[1].tolist() == [True] + [False] * 7
    ((place, name, reason),) = batch["partly_guided_rows"]
    assert place == name == item["id"] and "unguided_rows" not in batch
    assert reason.count("lies behind the first 40 tokens") == 8 - guided[0].sum()
    assert f"row {item['id']}, guidance[6] {QUESTION!r}" in reason


def test_masks_may_be_encoded(collator):
    plain = guide(conversation(), mask=mask(50, 30, box=(5, 5, 25, 25)))
    expected = collator([plain])
    for kind in ("1", "L", "RGB"):
        stored = {"bytes": encoded(plain["guidance"]["mask"].convert(kind), "PNG"), "path": None}
        batch = collator([guide(conversation(), mask=stored)])
        assert same(batch, expected)


def test_masks_with_soft_edges_are_cut_at_one_half(collator):
    soft = mask(50, 30, box=(5, 5, 25, 25)).convert("L")
    expected = collator([guide(conversation(), mask=soft)])
    for column in range(25, 30):  # fades out from the object's edge
        soft.paste(100 - 20 * (column - 25), (column, 5, column + 1, 25))
    batch = collator([guide(conversation(), mask=soft)])
    assert same(batch, expected)


def test_long_texts_are_cut(collator):
    rows = [guide(conversation(), message_index=3), row(guided=True), text_row()]
    whole = collator(rows)
    length = whole["input_ids"].shape[1]
    cut_collator = AgeVlmDataCollator(collator.processor, max_length=40)
    cut = cut_collator(rows)
    assert length > 40 and cut.keys() == whole.keys()
    for name, value in whole.items():
        per_token = value.dim() > 1 and value.shape[1] == length
        expected = value[..., :40] if name == "guidance_query_mask" else value[:, :40] if per_token else value
        assert torch.equal(cut[name], expected), name
    assert not cut["guidance_query_mask"][0].any()  # its query was cut off: the trainer counts it as unguided
    assert same(AgeVlmDataCollator(collator.processor, max_length=length)(rows), whole)


@pytest.mark.parametrize("multiple", [7, 16])
def test_lengths_are_rounded_up_to_a_multiple(collator, multiple):
    rows = [guide(conversation()), row(images=2), text_row()]
    plain = collator(rows)
    length = plain["input_ids"].shape[1]
    batch = AgeVlmDataCollator(collator.processor, pad_to_multiple_of=multiple)(rows)
    assert batch.keys() == plain.keys()
    padded = batch["input_ids"].shape[1]
    assert padded % multiple == 0 and 0 <= padded - length < multiple
    query, wide = plain.pop("guidance_query_mask"), batch.pop("guidance_query_mask")
    assert wide.shape[-1] == padded and torch.equal(wide[..., :length], query) and not wide[..., length:].any()
    for name, value in plain.items():
        if value.dim() > 1 and value.shape[1] == length:
            assert torch.equal(batch[name][:, :length], value), name
            assert batch[name].shape[1] == padded, name
        else:
            assert torch.equal(batch[name], value), name
    assert (batch["labels"][:, length:] == -100).all()
    for name in ("attention_mask", "cross_attention_mask"):
        assert not batch[name][:, length:].any(), name
    cut = AgeVlmDataCollator(collator.processor, max_length=length, pad_to_multiple_of=length - 1)(rows)
    assert same(cut, {**plain, "guidance_query_mask": query})  # never above `max_length`


def late_row() -> dict:
    """Its picture stands behind the first 40 tokens, and it is longer than other rows."""
    late = guide(conversation(id="late"), message_index=3, query=QUESTION)
    late["messages"][1]["content"], late["messages"][3]["content"] = QUESTION * 3, QUESTION + IMAGE
    return late


def test_the_model_takes_what_comes_out(collator):
    model = tiny_model()
    batch = collator([guide(conversation()), text_row(), row(images=2)])
    batch.pop("guidance_mask")
    output = model(**batch)
    assert output.loss.isfinite()
    assert output.cross_attention_maps.shape == (2, 3, 1, 18)
    assert output.cross_attention_maps.sum(-1).gt(0.99).tolist() == [[[True], [False], [False]]] * 2


JPEG = encoded(picture(200, 200), "JPEG")


def says(row_id: str, index: int, words: str) -> dict:
    """A row one of whose messages ends with `words`."""
    bad = row(row_id)
    messages = [dict(message) for message in bad["messages"]]
    messages[index]["content"] += words
    return {**bad, "messages": messages}


BROKEN = {
    "broken bytes": (row("bad", images=1) | {"images": [{"bytes": b"no picture", "path": None}]}, "decoded"),
    "truncated JPEG": (row("bad") | {"images": [{"bytes": JPEG[:2000], "path": None}]}, "truncated"),
    "mask of another size": (
        guide(conversation(id="bad"), mask=mask(30, 50)),
        "mask is 30 x 50 but .* is 50 x 30",
    ),
    "empty mask": (guide(conversation(id="bad"), mask=mask(50, 30, box=(0, 0, 0, 0))), "mask is empty"),
    "broken mask": (guide(conversation(id="bad"), mask={"bytes": b"no picture", "path": None}), "mask.*decoded"),
    "query elsewhere": (guide(conversation(id="bad"), message_index=2), "'red apple' is not in messages.2. 'No'"),
    "too many pixels": (
        row("bad") | {"images": [{"bytes": encoded(Image.new("1", (10_000, 9_000)), "PNG"), "path": None}]},
        "10000 x 9000 pixels exceed the limit of 64000000; shrink",
    ),
    "no placeholder": (row("bad") | {"messages": text_row()["messages"]}, r"0 <\|image\|> in messages but 1 picture"),
    "no picture": (row("bad") | {"images": []}, r"1 <\|image\|> in messages but 0 picture"),
    "end of a turn": (says("bad", 0, "A<|eot_id|>"), r"messages\[0\].content holds '<\|eot_id\|>', a control token"),
    "a role": (says("bad", 1, "<|start_header_id|>user"), r"messages\[1\].content holds '<\|start_header_id\|>'"),
    "begin of text": (says("bad", 1, "<|begin_of_text|>"), r"messages\[1\].content holds '<\|begin_of_text\|>'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_rows_are_named(collator, case):
    bad, message = BROKEN[case]
    with pytest.raises(ValueError, match=rf"(?s)id 'bad'.*{message}"):
        collator([row("good"), bad, text_row()])


@pytest.mark.parametrize("case", [*BROKEN, "picture cut off"])
def test_a_row_that_cannot_be_used_leaves_the_others_as_they_are(collator, case):
    bad, message = BROKEN[case] if case in BROKEN else (late_row(), "1 of its picture placeholders lie behind")
    good = [guide(row("good"), query="red apple", message_index=0), text_row()]
    lenient = AgeVlmDataCollator(collator.processor, max_length=40, row_ids=True, strict=False)
    expected, batch = lenient(good), lenient([good[0], bad, good[1]])
    ((place, name, reason),) = batch.pop("skipped_rows")
    assert place == name == bad["id"] and re.search(message, reason, re.DOTALL)
    # Its mask, if it has one, guides nothing
    masked = bad.get("guidance") is not None
    assert batch.pop("unguided_rows", None) == ([[place, name, reason]] if masked else None)
    assert batch.pop("row_ids") == ["good", bad["id"], "text"] and expected.pop("row_ids") == ["good", "text"]
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(batch[key][[0, 2]], value), key
    assert (batch["labels"][1] == -100).all()
    assert not batch["image_mask"][1].any() and not batch["guidance_query_mask"][1].any()
    assert not batch["guidance_mask"][1].any()


EARLY = {
    "images": [picture()],
    "messages": [{"role": "user", "content": QUESTION + IMAGE}, {"role": "assistant", "content": "Yes"}],
}
UNGUIDABLE = {
    "before the picture": (guide(text_row(**EARLY), message_index=0), "its query stands before the picture"),
    "cut off": (guide(conversation(), message_index=3), "its query lies behind the first 40 tokens"),
    "all phrases cut off": (phrased(2), "guidance[1] 'apple': its query lies behind the first 40 tokens"),
    "cropped off": (guide(row(images=1) | {"images": [picture(300, 40)]}, message_index=0), "covers no cell"),
}


@pytest.mark.parametrize("case", UNGUIDABLE)
def test_a_row_that_cannot_be_guided_is_named_with_the_reason(case):
    bad, message = UNGUIDABLE[case]
    processor = tiny_processor(geometry="crop" if case == "cropped off" else "pad")
    collator = AgeVlmDataCollator(processor, max_length=40, row_ids=True)
    batch = collator([guide(row("good"), message_index=0), bad])
    ((place, name, reason),) = batch["unguided_rows"]
    assert place == name == bad["id"] and message in reason and f"row {name}" in reason
    assert (batch["labels"][1] != -100).any() or "cut off" in case  # it is trained on all the same


def test_a_batch_without_any_good_row_teaches_nothing(collator):
    lenient = AgeVlmDataCollator(collator.processor, max_length=40, strict=False)
    batch = lenient([late_row(), BROKEN["broken bytes"][0]])
    assert [name for _, name, _ in batch.pop("skipped_rows")] == ["late", "bad"]
    assert batch.keys() == {"input_ids", "attention_mask", "labels"} and (batch["labels"] == -100).all()
    assert tiny_model()(**batch).logits.isfinite().all()


def test_a_blank_picture_changes_nothing_and_reaches_every_parameter(collator):
    """What processes that share parameters need of a batch without pictures."""
    rows = [text_row(), text_row(id="other")]
    plain = collator(rows)
    blank = AgeVlmDataCollator(collator.processor, always_pictures=True)(rows)
    assert set(blank) == {*plain, "pixel_values", "image_mask"}
    model = tiny_model()
    outputs = [model(**batch) for batch in (plain, blank)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    outputs[1].loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0
    mixed = [text_row(), row()]
    assert same(AgeVlmDataCollator(collator.processor, always_pictures=True)(mixed), collator(mixed))


def test_pixels_sent_as_bytes_are_normalized_to_the_bit(processor):
    rows = [row("row-0"), row("row-1", images=2, guided=True), row("row-2", images=0)]
    floats = AgeVlmDataCollator(processor)(rows)
    collator = AgeVlmDataCollator(processor, pixels_as_bytes=True)
    batch = collator(rows)
    assert batch["pixel_values"].dtype == torch.uint8
    shown = floats["image_mask"]  # places without a picture hold zeros, before and after: nothing looks at them
    normalized = collator.normalized(batch["pixel_values"])
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized[shown], floats["pixel_values"][shown])
    for name in floats.keys() - {"pixel_values"}:
        assert torch.equal(batch[name], floats[name])


def test_collator_travels_to_workers_of_any_kind(processor):
    collator = AgeVlmDataCollator(processor, max_length=64, pixels_as_bytes=True)
    rows = [row("row-0", guided=True)]
    assert same(collator(rows), pickle.loads(pickle.dumps(collator))(rows))


def test_a_guided_row_is_rendered_decoded_and_turned_once(processor, monkeypatch):
    """Stored sideways, picture and mask; every way to a turned picture begins with `getexif`."""
    calls = Counter()
    ways = [(chat_template_utils, "_render_with_assistant_indices"), (jinja2.Template, "render")]
    ways += [(Image, "open"), (Image.Image, "getexif")]

    def counted(place, name):
        function = getattr(place, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    guided = row("a", guided=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for place, name in ((guided["images"], 0), (guided["guidance"], "mask")):
        buffer = io.BytesIO()
        place[name].transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
        place[name] = {"bytes": buffer.getvalue(), "path": None}
    for place, name in ways:
        monkeypatch.setattr(place, name, counted(place, name))
    batch = AgeVlmDataCollator(processor)([guided])
    assert calls == {"_render_with_assistant_indices": 1, "open": 2, "getexif": 2}
    monkeypatch.undo()
    upright = AgeVlmDataCollator(processor)([row("a", guided=True)])
    assert same(batch, upright) and "guidance_mask" in batch
