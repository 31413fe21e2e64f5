"""The versions of transformers (compatibility_agevlm.py), names of folders, and weights that do not fit.

What differs between versions is measured on real ones by `make test-versions`; here the decisions alone.
"""

import copy
import logging
import shutil
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import transformers
from remote_code_worker import isolated

from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, compatibility_agevlm
from builders import tiny_batch, tiny_model, tiny_processor
from damages import OF_WEIGHTS


def loaded_under(version: str, monkeypatch, name: str = "compatibility"):
    """A fresh copy of the file, as transformers `version` would load it."""
    monkeypatch.setattr(transformers, "__version__", version)
    spec = spec_from_file_location(name, compatibility_agevlm.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def warned():
    """What the file warns of. Its own logger is read: whether transformers' records reach the root one, and from which
    level on, is a switch of the whole process that other tests and libraries turn.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers.agevlm")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.3.0", "5.9.0", "5.10.0.dev0"])
def test_an_old_version_is_refused_in_one_sentence(version, monkeypatch):
    with pytest.raises(ImportError) as error:
        loaded_under(version, monkeypatch)
    assert str(error.value) == (f"AGE-VLM needs transformers >= 5.10 (this is {version}): pip install -U transformers")


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("5.10.4", "past_key_values"),
        ("5.23.0", "past_key_values"),
        ("5.24.0.dev0", "cache"),
        ("5.24.0", "cache"),
        ("5.24.3", "cache"),
    ],
)
def test_tested_versions_load_in_silence_and_name_the_cache(version, name, monkeypatch, warned):
    assert name == loaded_under(version, monkeypatch).CACHE
    assert not warned


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0"])
def test_an_untested_version_warns_once_for_all_copies(version, monkeypatch, warned):
    for name in ("of_the_configuration", "of_the_model", "of_the_processor"):
        assert loaded_under(version, monkeypatch, name).CACHE == "cache"
    assert warned == [f"AGE-VLM has been tested with transformers 5.10 to 5.24; this is {version}."]


def test_the_cache_has_both_names(model):
    batch = tiny_batch(model)
    with torch.no_grad():
        first = model(**batch, use_cache=True)
        step = {"input_ids": batch["input_ids"][:, -1:], "image_mask": batch["image_mask"]}
        new = model(**step, cache=copy.deepcopy(first.cache)).logits
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            old = model(**step, past_key_values=copy.deepcopy(first.cache)).logits
    assert torch.equal(old, new)


def test_an_old_version_hands_the_cache_on_under_its_new_name(monkeypatch):
    old = loaded_under("5.10.4", monkeypatch)
    forward = old.accepts_past_key_values(lambda self, ids, cache=None: (ids, cache))
    assert forward(None, 1, past_key_values=2) == forward(None, 1, cache=2) == forward(None, 1, 2) == (1, 2)
    with pytest.raises(ValueError, match="Give the cache as `past_key_values`"):
        forward(None, 1, cache=2, past_key_values=3)


FOLDERS = ["agevlm (1)", "lr=1e-5", "it's", "模型", "a.b", "1", "class"]
LOAD_ALL = """
import sys, torch
from transformers import AutoModel, AutoProcessor
namespaces = set()
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="Is there a red apple?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs.input_ids.shape[1] + 2
    guidance = sys.modules[type(model).__module__.rpartition(".")[0] + ".guidance_agevlm"]
    namespaces.add(guidance._NAMESPACE)
assert len(namespaces) == len(sys.argv[1:]), namespaces
print("ok")
"""


def test_the_name_of_the_folder_does_not_matter(tmp_path):
    """All in one process: copies of the code stay apart."""
    model = tiny_model()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    folders = [tmp_path / name for name in FOLDERS]
    for folder in folders:
        shutil.copytree(tmp_path / "saved", folder)
    result = isolated(tmp_path, "-I", "-c", LOAD_ALL, *folders)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def test_default_configurations_share_nothing():
    first, second = AgeVlmConfig(), AgeVlmConfig()
    first.text_config.rope_parameters["rope_theta"] = 1.0
    first.vision_config.depths[0] = 99
    assert second.to_dict() == AgeVlmConfig().to_dict() != first.to_dict()


@pytest.mark.parametrize("damage", ["missing tensors", "unexpected tensor", "misshapen tensor", "NaN", "infinity"])
def test_weights_that_do_not_fit_are_refused(damage, tmp_path):
    """By the model itself, which users of a checkpoint load without `agevlm.models`."""
    tiny_model().save_pretrained(tmp_path)
    change, said = OF_WEIGHTS[damage]
    change(tmp_path)
    found = said.partition(" with ")[0]  # the shapes stand in the message of `agevlm.models` alone
    with pytest.raises(ValueError, match=rf"{tmp_path}: the weights do not fit .* Tensors: {found}.*\. Download"):
        AgeVlmForConditionalGeneration.from_pretrained(tmp_path)
    kind = damage.partition(" ")[0]
    if kind in ("missing", "unexpected"):  # transformers' own report is for its reader to judge
        _, report = AgeVlmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert report[f"{kind}_keys"]
