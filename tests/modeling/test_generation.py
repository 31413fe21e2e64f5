"""Generation as users meet it: mixed left-padded batches, every decoding method, turns over one cache, the pipeline.

The checks of transformers' GenerationTesterMixin, which its source distribution leaves out, on batches with pictures.
"""

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer, pipeline, set_seed
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from builders import picture, tiny_model


QUESTIONS = (
    "<|image|>Is there a red apple in the image?",
    "A house",
    "<|image|><|image|>How many cars are there? A car",
)
PICTURES = ([picture(96, 50)], [], [picture(seed=1), picture(40, 96, seed=2)])
NEW = 6


def ask(processor, rows=(0, 1, 2)) -> dict:
    """A left-padded batch of some of the three rows: one padded picture, none, two."""
    text, images = [QUESTIONS[row] for row in rows], [PICTURES[row] for row in rows]
    batch = processor(text=text, images=images if any(images) else None, padding=True, return_tensors="pt")
    assert len(rows) == 1 or not batch["attention_mask"][:, 0].all()
    return dict(batch)


def answer(model, batch: dict, **settings) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **settings}
    return model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]


ROWS = {
    "short": ("Is there a red apple?", "Yes, there is a red apple on the left of the house, and a car."),
    "long": ("Is there a red apple? Say yes or no, and tell me where it is and what is beside it, please.", "No"),
}


def collated(processor, names, **settings) -> dict:
    """A batch of TRL's stock collator, which pads prompts left, appends completions and moves the tokens left."""
    rows = []
    for question, said in map(ROWS.get, names):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        completion = [{"role": "assistant", "content": [{"type": "text", "text": said}]}]
        rows.append({"images": [picture(96, 50)], "prompt": prompt, "completion": completion})
    return dict(DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, **settings)(rows))


def losses(model, batch: dict) -> torch.Tensor:
    """The mean loss of each row's answer `(B,)`."""
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        scores = model(**batch).logits[:, :-1].log_softmax(-1)
    given = -scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return given.sum(-1) / (labels != -100).sum(-1)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("names", [("short", "long"), ("long", "short"), ("short", "short", "long")], ids="-".join)
def test_a_row_that_trl_collates_is_what_it_is_alone(model, processor, names, padding_side, monkeypatch):
    """Tokens that were moved after the processor made `cross_attention_mask` see their picture all the same."""
    monkeypatch.setattr(processor.tokenizer, "padding_side", padding_side)
    together = losses(model, collated(processor, names))
    alone = torch.cat([losses(model, collated(processor, [name])) for name in names])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.unique().numel() == 2  # of two different rows


def test_a_mask_that_was_left_behind_by_its_tokens_is_refused(model, processor):
    """TRL cuts the moved tokens to `max_length`: the mask of the prompts is then as long as the text."""
    batch = collated(processor, ("short", "long"))
    length = batch["cross_attention_mask"].shape[1]
    cut = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}
    pictures = {name: batch[name] for name in ("pixel_values", "image_mask", "visual_token_mask")}
    with pytest.raises(ValueError, match="Row 0: `cross_attention_mask` hides a picture from its own placeholder"):
        model(**cut, **pictures, cross_attention_mask=batch["cross_attention_mask"])
    model(**cut, **pictures)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_rows_answer_in_any_order_as_they_do_alone(model, processor, settings):
    alone = [answer(model, ask(processor, (row,)), **settings) for row in range(3)]
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        together = answer(model, ask(processor, order), **settings)
        assert torch.equal(together, torch.cat([alone[row] for row in order])), order
    # Answers that do not depend on the row prove nothing
    assert len({tuple(rows.flatten().tolist()) for rows in alone}) == 3


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"do_sample": True, "num_beams": 2}], ids=str)
def test_sampling_with_cache_equals_sampling_without(model, processor, settings):
    results = []
    for use_cache in (True, False):
        set_seed(0)
        batch = ask(processor)
        results.append(answer(model, batch, use_cache=use_cache, num_return_sequences=2, top_k=20, **settings))
    assert torch.equal(*results)
    assert results[0].shape == (6, NEW)


def test_scores_are_those_of_one_pass(model, processor):
    batch = ask(processor)
    output = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = batch["input_ids"].shape[1]
    whole = {**batch, "input_ids": output.sequences}
    whole["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**whole).logits[:, length - 1 : -1]
    assert torch.allclose(torch.stack(output.logits, 1), logits, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("row", [0, 2])
def test_drafted_tokens_change_no_answer(model, processor, row, padding):
    """Drafts of another model that sees the pictures (transformers hands them to every draft model) and from the
    prompt: rejected ones are taken back from the text's cache and not from the pictures'."""
    batch = ask(processor, (row,))
    expected = answer(model, batch)
    for name, fill in (("input_ids", model.config.text_config.pad_token_id), ("attention_mask", 0)):
        batch[name] = torch.nn.functional.pad(batch[name], (padding, 0), value=fill)
    batch["cross_attention_mask"] = torch.nn.functional.pad(batch["cross_attention_mask"], (0, 0, padding, 0))
    for draft in ({"assistant_model": tiny_model(seed=1)}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(answer(model, batch, **draft), expected), draft


def test_streaming_gives_the_text_of_the_answer(model, processor):
    batch = ask(processor, (0,))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    expected = answer(model, batch, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(expected[0])


@pytest.mark.parametrize("resend", [False, True])
def test_a_second_turn_goes_on_over_the_cache_of_the_first(model, processor, resend):
    """With the pictures left out, their cached keys are used; sent again, they are computed again."""
    first = ask(processor, (2,))
    cache = DynamicCache(config=model.config)
    told = model.generate(**first, cache=cache, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
    more = processor.tokenizer("How many trees?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    second = {**first, "input_ids": torch.cat([told, more], dim=1)}
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    expected = answer(model, second)
    if not resend:
        second.pop("pixel_values")
    assert torch.equal(answer(model, second, cache=cache), expected)


def test_the_pipeline_answers_batches_of_chats(model, processor):
    """Chats with pictures in one batch, text alone in one of its own: the pipeline refuses to mix them."""

    def chat(text, *pictures):
        parts = [*({"type": "image", "image": image} for image in pictures), {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    ask_pipeline = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [chat("A red apple?", picture()), chat("How many cars are in the image?", picture(50, 96, seed=1))]
    settings = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 4}, "return_full_text": False}
    alone = [ask_pipeline(one, **settings)[0]["generated_text"] for one in chats]
    together = [answers[0]["generated_text"] for answers in ask_pipeline(chats, batch_size=2, **settings)]
    assert together == alone
    for one in (chats[0], chat("A house")):
        batch = processor.apply_chat_template(
            one, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        tokens = answer(model, dict(batch), max_new_tokens=4, min_new_tokens=0)
        expected = processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert ask_pipeline(one, **settings)[0]["generated_text"] == expected


@pytest.mark.parametrize("named", [True, False])
def test_a_forgotten_picture_is_no_question(model, processor, named):
    batch = ask(processor)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match="Row 0 has a placeholder of a picture and there is no `pixel_values`"):
        model.generate(**{"input_ids" if named else "inputs": ids}, attention_mask=mask)
    assert answer(model, ask(processor, (1,))).shape == (1, NEW)
