"""Shared fixtures; the objects come from `builders.py`."""

import pytest
import torch

from builders import tiny_model, tiny_processor


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster on one thread, and results do not depend on the machine's cores."""
    torch.set_num_threads(1)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()
