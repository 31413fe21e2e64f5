"""Recorded attention is what eager attention gives, and recording changes nothing."""

import copy

import pytest
import torch

from agevlm.analysis.recording import recording
from builders import picture
from vlms import EVERY, llava


QUESTION = "Is there a red apple?"


def _generate(subject, inputs):
    return subject.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("name", EVERY)
def test_weights_are_those_of_eager_attention(name):
    """Of the prompt's tokens, and of every generated one though it comes from the cache."""
    subject = EVERY[name]()
    encoded = subject.encode([picture(100, 60)], [QUESTION], answer_next=True)
    length = encoded.inputs["input_ids"].shape[1]
    plain = _generate(subject, encoded.inputs)
    tokens = torch.tensor([length - 4, length - 1])
    configs = {index: module.config for index, module in subject.attention.items()}
    with recording(subject.attention, tokens) as recorders:
        recorded = _generate(subject, encoded.inputs)
    torch.testing.assert_close(recorded, plain, rtol=0, atol=0)
    assert all(module.config is configs[index] for index, module in subject.attention.items())

    eager = copy.deepcopy(subject.model)
    eager.set_attn_implementation("eager")
    inputs = dict(encoded.inputs, input_ids=recorded)
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, 4), value=value)
    with torch.no_grad():
        output = eager.base_model(**inputs, output_attentions=True, use_cache=False)
    expected = output.attentions if subject.concatenates else output.cross_attentions
    for (index, recorder), position in zip(recorders.items(), range(len(expected)), strict=True):
        weights = expected[position][0].mean(0)
        prompt, *steps = recorder.weights
        torch.testing.assert_close(prompt, weights[tokens][:, : prompt.shape[1]], atol=1e-5, rtol=1e-4)
        assert len(steps) == 3, index
        for step, row in enumerate(steps):
            torch.testing.assert_close(row[0], weights[length + step, : row.shape[1]], atol=1e-5, rtol=1e-4)


def test_other_layers_stay_on_their_kernel():
    subject = llava()
    first, second = subject.attention[0], subject.attention[1]
    with recording({0: first}, torch.tensor([0])):
        assert first.config is not second.config
        assert second.config._attn_implementation == subject.model.config.text_config._attn_implementation == "sdpa"
    assert first.config is second.config


def test_a_mistake_leaves_nothing_behind():
    subject = llava()
    module = subject.attention[0]
    config = module.config
    with pytest.raises(RuntimeError), recording({0: module}, torch.tensor([0])):
        raise RuntimeError
    assert module.config is config
    with recording({0: module}, torch.tensor([0])), pytest.raises(ValueError, match="is recorded already"):  # noqa: SIM117
        with recording({0: module}, torch.tensor([0])):
            pass
    subject.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"), recording({0: module}, torch.tensor([0])):
        pass
