"""Checkpoints are loaded by folder, whatever their classes, and what is loaded is what was saved."""

import pytest
import torch

from agevlm.analysis.attention import attend
from agevlm.analysis.subjects import Subject
from agevlm.models import load
from builders import picture, save_tiny
from vlms import fast_vlm, llava, ours, smolvlm


@pytest.mark.parametrize("make", [ours, llava, fast_vlm, smolvlm], ids=lambda make: make.__name__)
def test_a_folder_gives_the_same_answers_and_looks(make, tmp_path):
    """A ConvNeXt tower knows no attention kernels, so none may be asked for."""
    subject = make()
    save_tiny(tmp_path, subject.model, subject.processor)
    loaded = Subject(*load(tmp_path))
    assert not loaded.model.training
    assert loaded.concatenates == subject.concatenates
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in subject.model.state_dict().items())
    first, second = (
        attend(each.model, each.processor, picture(60, 40), "Is there an apple?", max_new_tokens=2)
        for each in (subject, loaded)
    )
    assert first.answer == second.answer
    assert (first.weights == second.weights).all()


def test_what_is_no_checkpoint_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=str(folder)):
            load(folder)
