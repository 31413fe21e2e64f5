"""Shared fixtures; the objects come from `builders.py`."""

import os


# TRL reports every trainer from a background thread. Tests need no network, and a thread that still waits for it when
# its process exits can take the process down with it.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when huggingface_hub is imported

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
