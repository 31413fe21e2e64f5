"""transformers' own common tests, run on our image processor and processor.

The tests are no part of the installed transformers: point AGEVLM_TRANSFORMERS_TESTS at the folder `tests` of its
source distribution (of the version in constraints.txt), and install `parameterized`. Else everything here is skipped.

What skips itself is about audio, video or tools, or about attributes that no processor of transformers has any more.
"""

import atexit
import importlib.util
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import pytest
from transformers.utils import is_torchvision_available

from agevlm.processing import AgeVlmImageProcessor, AgeVlmImageProcessorPil, AgeVlmProcessor
from builders import picture, tiny_processor


FOLDER = os.environ.get("AGEVLM_TRANSFORMERS_TESTS")
if not FOLDER:
    pytest.skip("AGEVLM_TRANSFORMERS_TESTS names no folder with transformers' tests", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need `parameterized`")


def a_picture(url: str) -> str:
    """In place of every fixture on the Hub."""
    path = Path(tempfile.gettempdir()) / f"agevlm-{os.getpid()}.png"
    if not path.exists():
        picture(640, 480).save(path)
        atexit.register(path.unlink)
    return str(path)


def upstream(name: str) -> types.ModuleType:
    """A module of transformers' tests."""
    fetcher = types.ModuleType("fetch_hub_objects_for_ci")
    fetcher.url_to_local_path = a_picture
    sys.modules["fetch_hub_objects_for_ci"] = fetcher
    spec = importlib.util.spec_from_file_location(f"transformers_tests_{name}", Path(FOLDER) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


images = upstream("test_image_processing_common")
processors = upstream("test_processing_common")


class AgeVlmImageProcessingTester(images.ImageProcessingTester):
    def __init__(self, **kwargs):
        kwargs.setdefault("size", {"height": 96, "width": 96})
        super().__init__(**kwargs)

    def _get_image_processing_classes(self):
        classes = {"pil": AgeVlmImageProcessorPil}
        return {"torchvision": AgeVlmImageProcessor, **classes} if is_torchvision_available() else classes


class AgeVlmImageProcessingTest(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = AgeVlmImageProcessingTester
    backend_equivalence_atol = 1.01 / 255 / 0.26  # upstream allows 0.1

    def test_call_numpy_4_channels(self):
        self.skipTest("The tower reads RGB; Mllama's and LLaVA's own tests skip this one for the same reason")

    @unittest.skipUnless(is_torchvision_available(), "torchvision is not installed")
    def test_new_models_require_torchvision_backend(self):
        super().test_new_models_require_torchvision_backend()


class AgeVlmProcessorTest(processors.ProcessorTesterMixin, unittest.TestCase):
    processor_class = AgeVlmProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_processor().tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor().image_processor

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": tiny_processor().chat_template}
