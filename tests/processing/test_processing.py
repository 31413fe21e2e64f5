"""The processor: row-aligned pictures, who sees what, the query's tokens, the chat template, saving."""

import itertools
import json

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.trainer_utils import align_special_tokens

from agevlm.processing import AgeVlmProcessor
from agevlm.processing.build import build_processor
from builders import (
    CHAT,
    IMAGE,
    IMAGE_KEYS,
    QUESTION,
    TEXT_KEYS,
    mask,
    picture,
    same,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Llama-3's: the beginning-of-text token is added to every text."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


# Rows and pictures


@pytest.mark.parametrize("images", [None, [], [[], []]])
def test_text_only_batches_carry_no_image_keys(processor, images):
    texts = ["How many", "A blue car and a green tree"]
    batch = processor(images=images, text=texts, return_tensors="pt")
    assert set(batch) == TEXT_KEYS
    assert same(batch, processor.tokenizer(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batches_equal_their_rows_alone(processor, side):
    images = [[picture()], [], [picture(40, 90, seed=1), picture(200, 30, seed=2)]]
    texts = [f"{IMAGE}How many cars?", "A house", f"Yes {IMAGE} and {IMAGE} No, a long text after both"]
    batch = processor(images=images, text=texts, padding_side=side, return_tensors="pt")
    assert set(batch) == TEXT_KEYS | IMAGE_KEYS
    length = batch["input_ids"].shape[1]
    assert {name: (tuple(batch[name].shape), batch[name].dtype) for name in IMAGE_KEYS} == {
        "pixel_values": ((3, 2, 3, 96, 96), torch.float32),
        "image_mask": ((3, 2), torch.bool),
        "visual_token_mask": ((3, 2, 9), torch.bool),
        "cross_attention_mask": ((3, length, 2), torch.bool),
    }
    assert batch["image_mask"].tolist() == [[True, False], [False, False], [True, True]]
    for row, (pictures, text) in enumerate(zip(images, texts, strict=True)):
        alone = processor(images=[pictures], text=[text], return_tensors="pt")
        size = alone["input_ids"].shape[1]
        part = slice(length - size, None) if side == "left" else slice(0, size)
        assert torch.equal(batch["input_ids"][row, part], alone["input_ids"][0])
        assert batch["attention_mask"][row].sum() == size == batch["attention_mask"][row, part].sum()
        count = len(pictures)
        for name in ("pixel_values", "visual_token_mask"):
            if count:
                assert torch.equal(batch[name][row, :count], alone[name][0])
            assert not batch[name][row, count:].any()
        if count:
            assert torch.equal(batch["cross_attention_mask"][row, part, :count], alone["cross_attention_mask"][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_sees_the_images_whose_placeholder_has_come(processor, side):
    texts = ["no picture at all", f"Yes {IMAGE} and {IMAGE} No", f"{IMAGE}Yes"]
    images = [[], [picture(), picture()], [picture()]]
    batch = processor(images=images, text=texts, padding_side=side, return_tensors="pt")
    expected = torch.zeros_like(batch["cross_attention_mask"])
    for row, ids in enumerate(batch["input_ids"].tolist()):
        seen = 0
        for token, token_id in enumerate(ids):
            seen += token_id == processor.image_token_id
            if batch["attention_mask"][row, token]:
                expected[row, token, :seen] = True
    assert torch.equal(batch["cross_attention_mask"], expected)
    assert expected[1].any() and not expected[0].any() and not expected.all()


def test_flat_lists_follow_the_placeholders(processor):
    one, two, three = (picture(seed=seed) for seed in range(3))
    texts = [f"{IMAGE}{IMAGE}Yes", "No", f"{IMAGE}No"]
    nested = processor(images=[[one, two], [], [three]], text=texts, return_tensors="pt")
    assert same(processor(images=[one, two, three], text=texts, return_tensors="pt"), nested)
    single = processor(images=[[one]], text=[f"{IMAGE}Yes"], return_tensors="pt")
    assert same(processor(images=one, text=f"{IMAGE}Yes", return_tensors="pt"), single)
    assert same(processor(images=[one], text=f"{IMAGE}Yes", return_tensors="pt"), single)


def test_images_may_be_files(processor, tmp_path):
    picture().save(tmp_path / "picture.png")
    texts = [f"{IMAGE}Yes", "No"]
    from_files = processor(images=[[str(tmp_path / "picture.png")], []], text=texts, return_tensors="pt")
    assert same(from_files, processor(images=[[picture()], []], text=texts, return_tensors="pt"))


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([[], [picture()]], [f"{IMAGE}Yes", "No"], r"Row 0 has 0 picture\(s\) but 1 placeholder\(s\).*Put one"),
        ([[picture()], [picture()]], [f"{IMAGE}Yes", "No"], r"Row 1 has 1 picture\(s\) but 0 placeholder\(s\)"),
        (None, ["No", f"{IMAGE}Yes"], r"Row 1 has 0 picture\(s\) but 1 placeholder\(s\)"),
        ([picture(), picture()], f"{IMAGE}Yes", r"Row 0 has 2 picture\(s\) but 1 placeholder\(s\)"),
        ([picture(), picture()], [f"{IMAGE}{IMAGE}{IMAGE}", "No"], r"Row 0 has 1 picture\(s\) but 3"),
        ([[picture()]], [f"{IMAGE}Yes", "No"], r"Row 1 has no list of pictures: 1 lists .* 2 texts .*Give one list"),
        ([[], [picture()]], f"{IMAGE}Yes", r"Row 1 has no text: 2 lists of pictures for 1 texts .*Give one list"),
    ],
)
def test_pictures_and_placeholders_that_do_not_fit_are_refused(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


# Special tokens


def test_there_is_no_second_beginning_of_text():
    processor = build_processor(adding_bos(tiny_tokenizer()), image_size=96)
    bos = processor.tokenizer.bos_token_id
    rendered = processor.apply_chat_template(CHAT[:1])
    for text in ("A blue car", rendered, ["A blue car"], [rendered, rendered]):
        ids = processor(text=text, return_tensors="pt")["input_ids"]
        assert ids[:, 0].eq(bos).all() and (ids == bos).sum() == len(ids)
    assert bos not in processor(text=["A blue car"], add_special_tokens=False)["input_ids"][0]
    assert bos not in processor(text=["A blue car"], text_kwargs={"add_special_tokens": False})["input_ids"][0]
    with pytest.raises(ValueError, match=r"Row 1 starts with '<\|begin_of_text\|>' and row 0 does not. Render all"):
        processor(text=["A blue car", rendered])


def test_tokenizers_with_reserved_tokens_keep_their_size():
    tokenizer = adding_bos(tiny_tokenizer())
    before, ids = len(tokenizer), tokenizer("A blue car").input_ids
    last_reserved = tokenizer.convert_tokens_to_ids("<|reserved_special_token_1|>")
    processor = build_processor(tokenizer, image_size=96)
    assert len(processor.tokenizer) == before
    assert processor.image_token_id == last_reserved
    assert processor.tokenizer("A blue car").input_ids == ids
    assert processor.tokenizer.tokenize(f"a{IMAGE}b") == ["a", IMAGE, "b"]
    assert "<|reserved_special_token_0|>" in processor.tokenizer.get_vocab()


def test_tokenizers_without_reserved_tokens_grow():
    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    special = {token["content"] for token in description["added_tokens"]}
    description["added_tokens"] = []
    vocabulary = [token for token in description["model"]["vocab"] if token not in special]
    description["model"]["vocab"] = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    tokenizer.add_special_tokens({"eos_token": AddedToken("</s>", special=True)})
    before = len(tokenizer)
    processor = build_processor(tokenizer, image_size=96)
    assert len(processor.tokenizer) == before + 4  # the placeholder, the header's two and the end of turn
    assert processor.image_token_id >= before
    assert processor.tokenizer.pad_token == "</s>"
    # Generation stops where the template ends a turn, whatever ended texts before
    assert processor.tokenizer.eos_token == processor.apply_chat_template(CHAT[:3])[-len("<|eot_id|>") :]
    batch = processor.apply_chat_template(
        [CHAT, CHAT[1:2]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images": [[picture()], [picture()]]},
    )
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 1]


def test_tokenizers_without_padding_and_end_can_pad():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert tokenizer.pad_token is None and tokenizer.eos_token is None
    processor = build_processor(tokenizer, image_size=96)
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token == "<|eot_id|>"
    assert processor(text=["A", "A blue car"], return_tensors="pt")["attention_mask"].sum(1).unique().numel() == 2


def test_training_tells_the_model_where_an_answer_ends():
    """With a tokenizer of another end token, as SmolLM2's."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    old = tokenizer.eos_token_id
    processor = build_processor(tokenizer, image_size=96)
    model = tiny_model()
    model.generation_config.eos_token_id = old
    align_special_tokens(model, processor)
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end != old and end in model.generation_config.eos_token_id


def test_a_tokenizer_without_the_placeholder_is_refused(processor):
    with pytest.raises(ValueError, match=r"no token '<\|image\|>'. Use `agevlm.processing.build.build_processor`"):
        AgeVlmProcessor(processor.image_processor, tiny_tokenizer())
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        build_processor(tiny_tokenizer(), image_size=100)


# Chat template


def test_the_template_preserves_prefixes(processor):
    texts = [processor.apply_chat_template(CHAT[:turns]) for turns in range(1, len(CHAT) + 1)]
    for shorter, longer in itertools.pairwise(texts):
        assert longer.startswith(shorter)
    prompt = processor.apply_chat_template(CHAT[:2], add_generation_prompt=True)
    assert texts[2].startswith(prompt)
    assert prompt == texts[1] + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert texts[2] == prompt + "No<|eot_id|>"
    assert texts[-1].count(processor.tokenizer.bos_token) == 1


def structured(message: dict) -> dict:
    """The same message with its content in parts."""
    pieces = message["content"].split(IMAGE)
    parts = [part for piece in pieces for part in ({"type": "text", "text": piece}, {"type": "image"})][:-1]
    return {**message, "content": parts}


def test_strings_and_parts_render_the_same(processor):
    chat = [*CHAT, {"role": "user", "content": f"  Yes {IMAGE}\n{IMAGE}  No \n"}]
    parts = [structured(message) for message in chat]
    assert processor.apply_chat_template(parts) == processor.apply_chat_template(chat)
    assert processor.tokenizer.apply_chat_template(chat, tokenize=False) == processor.apply_chat_template(chat)
    with pytest.raises(TemplateError, match=r"part of type 'video'. Give text and image parts"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step", [1, -1])
def test_the_generation_mask_covers_answers_and_their_end(processor, side, step):
    """Whichever row comes first: one without pictures has no placeholder that transformers would shift."""
    text = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
    chats = [CHAT, CHAT[1:3], CHAT[:2], text][::step]
    images = [[picture()], [picture()], [picture()], []][::step]
    batch = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"images": images, "padding_side": side},
    )
    answers = batch["assistant_masks"].bool()
    for row, chat in enumerate(chats):
        expected = "".join(turn["content"] + "<|eot_id|>" for turn in chat if turn["role"] == "assistant")
        assert processor.tokenizer.decode(batch["input_ids"][row][answers[row]]) == expected
    assert not (answers & ~batch["attention_mask"].bool()).any()


@pytest.mark.parametrize("group", ["common_kwargs", "text_kwargs", "images_kwargs"])
def test_arguments_may_stand_in_their_group(processor, group):
    inputs = {"images": [[picture()], []], "text": [f"{IMAGE}A red apple", "No"]}
    grouped = {"return_tensors": "pt", **({"return_offsets_mapping": True} if group == "text_kwargs" else {})}
    batch = processor(**inputs, **{group: grouped})
    assert ("offset_mapping" in batch) == (group == "text_kwargs")
    batch.pop("offset_mapping", None)
    assert same(batch, processor(**inputs, return_tensors="pt"))
    assert "return_tensors" in grouped  # the caller's


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_batch_of_pictures_may_be_one_array(processor, kind):
    pictures = np.stack([np.asarray(picture(seed=seed)) for seed in range(2)])
    texts = [f"{IMAGE}A red apple", f"{IMAGE}No"]
    expected = processor(images=list(pictures), text=texts, return_tensors="pt")
    assert same(processor(images=kind(pictures), text=texts, return_tensors="pt"), expected)


def test_one_call_equals_two(processor):
    one, two = picture(), picture(50, 20, seed=1)
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": one},
                    {"type": "text", "text": "and"},
                    {"type": "image", "image": two},
                ],
            }
        ],
        [{"role": "user", "content": QUESTION}],
    ]
    at_once = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    assert texts[0].count(IMAGE) == 2
    assert same(at_once, processor(images=[[one, two], []], text=texts, return_tensors="pt"))


# Saving


def test_saving_and_loading_changes_nothing(tmp_path):
    processor = tiny_processor(image_size=64, geometry="stretch")
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, AgeVlmProcessor)
    assert again.to_dict() == processor.to_dict()
    assert again.chat_template == processor.chat_template == again.tokenizer.chat_template
    assert again.image_token_id == processor.image_token_id
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.tokenizer.padding_side == "left"
    assert again.image_processor.grid == (2, 2)
    kwargs = {
        "images": [[picture(50, 20)], []],
        "text": [f"{IMAGE}{QUESTION}", processor.apply_chat_template(CHAT[:1])[len("<|begin_of_text|>") :]],
        "guidance_spans": [(20, 30), None],
        "guidance_masks": [mask(50, 20, box=(3, 3, 9, 9)), None],
        "return_tensors": "pt",
    }
    before, after = processor(**kwargs), again(**kwargs)
    assert same(before, after)
    assert before["attention_mask"][:, -1].all() and not before["attention_mask"][:, 0].all()  # padded on the left
    again.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text(), name


def test_numpy_is_returned_as_numpy(processor):
    batch = processor(images=[[picture()]], text=[f"{IMAGE}Yes"], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in batch.values())


@pytest.mark.parametrize(
    ("tokens", "rendered"),
    [
        (
            ["<|im_start|>", "<|im_end|>"],  # SmolLM2's; a frozen language model has never seen Llama-3's
            "<|im_start|>user\n<|image|>Is it?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
        ),
        (
            ["<|system|>", "<|user|>", "<|assistant|>"],
            "<|begin_of_text|><|user|><|image|>Is it?<|assistant|>Yes<|eot_id|>",
        ),
    ],
    ids=["ChatML", "one token a role"],
)
def test_tokenizers_with_turn_tokens_are_spoken_to_in_them(tokens, rendered):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    size = len(tokenizer)
    processor = build_processor(tokenizer, image_size=96)
    assert len(processor.tokenizer) == size  # the placeholder takes a reserved token's place
    end = "<|im_end|>" if "<|im_end|>" in tokens else "<|eot_id|>"
    assert processor.tokenizer.eos_token == end
    messages = [{"role": "user", "content": "<|image|>Is it?"}, {"role": "assistant", "content": "Yes"}]
    text = processor.apply_chat_template(messages)
    assert text == rendered
    assert text.startswith(processor.apply_chat_template(messages[:1], add_generation_prompt=True))
    parts = [structured(message) for message in [*CHAT, *messages]]
    assert processor.apply_chat_template(parts) == processor.apply_chat_template([*CHAT, *messages])
    encoded = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": [picture()]},
    )
    answer = [
        token for token, kept in zip(encoded["input_ids"][0], encoded["assistant_masks"][0], strict=True) if kept
    ]
    assert processor.tokenizer.decode(answer) == f"Yes{end}"
