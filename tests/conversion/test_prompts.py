"""Prompts of converted models: the tokens are those of the published code, whatever is asked."""

import json

import published_baselines as published
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_baselines import QUESTION, conversation, encode

from agevlm.conversion.prompt import build_processor, load_tokenizer
from agevlm.conversion.sources import Source
from builders import picture


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def speaker(request, tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(words)
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": request.param}))
    tokenizer = load_tokenizer(Source("tokenizer", folder, None, ()))
    return build_processor(tokenizer, 64, 64), request.param


def ids_of(processor, image, turns: list[str]) -> list[int]:
    return encode(processor, [conversation(image, turns)])["input_ids"][0].tolist()


def expected_ids(processor, words: bytes, legacy: bool, turns: list[str], picture: bool = True) -> list[int]:
    """Of a picture of one token."""
    ids = published.token_ids(words, published.prompt(turns, picture), legacy)
    return [processor.image_token_id if token == -200 else token for token in ids]


WORDS = st.text(
    st.characters(exclude_characters="<>▁", exclude_categories=["Cs", "Cc"]) | st.sampled_from(" \n\t"), min_size=1
)


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(WORDS, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1))
def test_tokens_are_those_of_the_published_code(speaker, words, turns):
    processor, legacy = speaker
    assert ids_of(processor, picture(8, 8), turns) == expected_ids(processor, words, legacy, turns)
    assert ids_of(processor, None, turns) == expected_ids(processor, words, legacy, turns, picture=False)


def test_the_prompt_to_the_letter(speaker):
    """Written out once, against a slip on both sides: one `<s>`, the system's sentence, a space behind the picture."""
    processor, _ = speaker
    text = processor.apply_chat_template([conversation(None, [QUESTION])], add_generation_prompt=True)[0]
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: {QUESTION} ASSISTANT:"
    )
    asked = processor.apply_chat_template([conversation(picture(8, 8), [QUESTION])], add_generation_prompt=True)[0]
    assert asked == text.replace("USER: ", "USER: <image> \n")
    ids = ids_of(processor, picture(8, 8), [QUESTION])
    assert ids.count(1) == 1 and ids[0] == 1
    at = ids.index(processor.image_token_id)
    assert processor.tokenizer.convert_ids_to_tokens(ids[at + 1 : at + 3]) == ["▁", "\n"]  # Llama's own: <0x0A>


def test_a_system_prompt_of_ones_own(speaker):
    processor, _ = speaker
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for first in (system, {"role": "system", "content": "Be brief."}):
        text = processor.apply_chat_template([[first, *conversation(None, ["a"])]], add_generation_prompt=True)[0]
        assert text == "Be brief. USER: a ASSISTANT:"


def test_answers_are_what_is_learned(speaker):
    processor, _ = speaker
    turns = [QUESTION, "Yes.", "Sure?", "No."]
    made = processor.apply_chat_template(
        [conversation(picture(8, 8), turns)], tokenize=True, return_dict=True, return_tensors="pt",
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    learned = made["input_ids"][0][torch.as_tensor(made["assistant_masks"][0]).bool()]
    assert processor.tokenizer.decode(learned) == "Yes.</s>No.</s>"


def test_strings_with_this_projects_placeholder_are_read_the_same(loaded):
    _, _, processor = loaded
    image = picture()
    text = processor.apply_chat_template(
        [{"role": "user", "content": f"<|image|>{QUESTION}"}], add_generation_prompt=True, tokenize=False
    )
    made = processor(images=[[image]], text=[text], return_tensors="pt")
    assert torch.equal(made["input_ids"], encode(processor, [conversation(image, [QUESTION])])["input_ids"])
