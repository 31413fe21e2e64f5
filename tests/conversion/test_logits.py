"""Converted models against an independent re-derivation: logits, pixels, batches, generation, a fresh process.

The other side of every comparison is `published_baselines.py`, which knows nothing of `agevlm.conversion`.
"""

import published_baselines as published
import pytest
import torch
from remote_code_worker import load_without_the_repository
from tiny_baselines import QUESTION, conversation, encode
from transformers import AutoProcessor

from builders import picture


# Two shapes of pictures, text alone between them, questions of different lengths.
MIXED = [(picture(80, 50), QUESTION), (None, "How many cars are there?"), (picture(50, 80, seed=1), "blue?")]


@pytest.mark.parametrize("size", [(300, 200), (90, 260), (64, 64)])
@pytest.mark.parametrize("turns", [[QUESTION], [QUESTION, "Yes.", "How many cars are there?"]])
def test_logits_are_those_of_the_published_code(loaded, size, turns):
    original, model, processor = loaded
    image = picture(*size)
    inputs = encode(processor, [conversation(image, turns)])
    expected = original.logits(image, turns)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[1] == expected.shape[1]
    words = expected.shape[-1]
    assert (logits[..., :words] - expected).abs().max() < 1e-5
    assert expected.std() > 0.1  # the comparison means something


def test_the_picture_decides_the_logits(loaded):
    original = loaded[0]
    first, second = (original.logits(picture(90, 60, seed=seed), [QUESTION])[0, -1] for seed in (0, 1))
    assert (first - second).abs().max() > 1e-3


def test_pixels_are_those_of_the_published_code(loaded, pair):
    original, _, processor = loaded
    with_pillow = AutoProcessor.from_pretrained(pair[1], backend="pil", trust_remote_code=True)
    for image in (picture(300, 200), picture(31, 64)):
        for each, *pillow in ((processor,), (with_pillow, True)):
            made = encode(each, [conversation(image, [QUESTION])])["pixel_values"]
            assert torch.allclose(made, published.pixels(image, original.size, *pillow), atol=1e-5)


def batch_of(processor, rows):
    return encode(processor, [conversation(image, [question]) for image, question in rows])


@pytest.mark.parametrize("rows", [MIXED, MIXED[::-1], MIXED[1:2] * 2], ids=["mixed", "reversed", "text alone"])
def test_a_left_padded_batch_is_the_published_code_row_by_row(loaded, rows):
    original, model, processor = loaded
    batch = batch_of(processor, rows)
    assert (batch["attention_mask"][:, 0] == 0).any() or len({question for _, question in rows}) == 1
    with torch.no_grad():
        together = model(**batch).logits
    for made, (image, question) in zip(together, rows, strict=True):
        expected = original.logits(image, [question])[0]
        assert (made[-len(expected) :, : expected.shape[1]] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_in_a_batch_is_the_published_codes_without_a_cache(loaded, use_cache):
    original, model, processor = loaded
    batch = batch_of(processor, MIXED)
    made = model.generate(**batch, max_new_tokens=6, use_cache=use_cache)[:, batch["input_ids"].shape[1] :]
    for row, (image, question) in zip(made.tolist(), MIXED, strict=True):
        expected = original.continuation(image, question, 6)
        assert row[: len(expected)] == expected


def test_one_alone_is_generated_as_in_a_batch(loaded):
    original, model, processor = loaded
    for image, question in MIXED:
        inputs = batch_of(processor, [(image, question)])
        made = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
        assert made == original.continuation(image, question, 8)


def test_added_tokens_change_no_word_and_are_never_said(loaded):
    original, model, processor = loaded
    words = original.config["vocab_size"]
    rows = model.lm_head.weight
    assert rows.shape[0] % 64 == 0 and model.config.image_token_id == words == processor.image_token_id
    assert torch.equal(rows[:words], original.weights["lm_head.weight"])
    inputs = encode(processor, [conversation(picture(), [QUESTION])])

    def louder(module, args, output):
        return torch.cat([output[..., :words], output[..., words:] + 1e4], dim=-1)

    hook = model.lm_head.register_forward_hook(louder)  # they would win every step
    try:
        said = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    finally:
        hook.remove()
    assert (said < words).all()


def test_a_user_without_the_repository_loads_asks_and_saves(pair, loaded, tmp_path):
    original, folder = pair
    load_without_the_repository(folder, *loaded[1:], picture(70, 40), tmp_path)
    code = [path.name for path in folder.glob("*.py")]
    assert code == ([] if original.system == "convllava" else ["modeling_mobilevlm.py"])
    assert not [path.name for path in folder.iterdir() if path.suffix in {".bin", ".model", ".pt"}]
