"""transformers' own common tests, run on our configuration and model.

They are no part of the installed transformers. To get them, for the version in constraints.txt:

    pip download transformers==<version> --no-deps --no-binary :all: --no-build-isolation
    tar xf transformers-<version>.tar.gz
    make test-upstream TRANSFORMERS_TESTS=transformers-<version>/tests

A source distribution leaves the sub-folders out, a git checkout has them. Where `generation/` is missing,
GenerationTesterMixin is replaced by nothing and `tests/modeling/test_generation.py` stands for it.
"""

import atexit
import importlib
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import torch

from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration, AgeVlmModel


FOLDER = os.environ.get("AGEVLM_TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("AGEVLM_TRANSFORMERS_TESTS names no folder with transformers' tests", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need `parameterized`")

# What the common tests import from sub-folders that a source distribution lacks. An empty mixin adds no test.
STAND_INS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",  # only read for configurations without parts
}


def upstream_package() -> str:
    """The tests as a package of links, with stand-ins for what is missing. Returns its name."""
    name = "transformers_upstream"
    if name not in sys.modules:
        package = Path(tempfile.mkdtemp()) / name
        atexit.register(shutil.rmtree, package.parent)
        package.mkdir()
        for entry in Path(FOLDER).resolve().iterdir():
            (package / entry.name).symlink_to(entry)
        for path, content in STAND_INS.items():
            if not (package / path).exists():
                (package / path).parent.mkdir(exist_ok=True)
                (package / path).write_text(content, encoding="utf-8")
        sys.path.insert(0, str(package.parent))
        importlib.import_module(name)
    return name


PACKAGE = upstream_package()
common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
configurations = importlib.import_module(f"{PACKAGE}.test_configuration_common")
generation = importlib.import_module(f"{PACKAGE}.generation.test_utils")

# The common tests look classes up by name among those that ship with transformers: here in copies that hold ours too.
common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "agevlm": "AgeVlmModel"}
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "agevlm": "AgeVlmForConditionalGeneration",
}

IMAGE_TOKEN = 3  # low, because tests of resized embeddings clamp the ids
IMAGE_SIZE = 64  # a grid of 2 x 2 visual tokens


class AgeVlmModelTester:
    """Configuration and inputs: rows of seven tokens with one picture each, as LLaVA's and Mllama's testers."""

    def __init__(self, parent):
        self.parent = parent
        self.is_training = True
        self.batch_size, self.seq_length = 7, 7  # with fewer rows, eager = sdpa adds some without a placeholder
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.vocab_size = 99

    def get_config(self) -> AgeVlmConfig:
        return AgeVlmConfig.tiny(
            self.vocab_size,
            IMAGE_TOKEN,
            cross_attention_layers=[1, 3],
            text_config={
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            vision_config={
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [4, 8, 16, 24],
                # At its default of 1e-6 the tower is an identity and its gradients vanish in float32.
                "layer_scale_init_value": 0.5,
            },
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        input_ids[:, 1] = IMAGE_TOKEN
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE]),
        }


class AgeVlmModelTest(common.ModelTesterMixin, generation.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (AgeVlmModel, AgeVlmForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True  # the year is read from a copyright line that we do not have
    _is_composite = True
    skip_test_image_features_output_shape = True  # a ConvNeXt has `hidden_sizes`, one a stage, and no `hidden_size`
    additional_model_inputs = ("pixel_values",)

    def setUp(self):
        self.model_tester = AgeVlmModelTester(self)
        self.config_tester = configurations.ConfigTester(self, config_class=AgeVlmConfig, has_text_modality=False)

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return 1 + len(self.model_tester.get_config().vision_config.depths)

    @unittest.skip("A ConvNeXt has no attention; FastVLM, whose tower is convolutional too, skips this as well")
    def test_get_image_features_attentions(self):
        pass

    def test_config(self):
        self.config_tester.run_common_tests()
