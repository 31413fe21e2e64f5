"""Shared fixtures; the objects come from `builders.py`."""

import gc
import os


# TRL reports every trainer from a background thread. Tests need no network, and a thread that still waits for it when
# its process exits can take the process down with it.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read when huggingface_hub is imported

import datasets
import hypothesis
import pytest
import torch
from transformers.utils import logging

from builders import tiny_model, tiny_processor


# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("agevlm", deadline=None)
hypothesis.settings.load_profile("agevlm")


def pytest_collection_finish():
    """What is imported stays: accelerate collects garbage behind every training and need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def switches_of_the_process():
    """What libraries and tested code turn for the whole process (environment, logging, progress bars, torch's modes)
    is as it was again, so that no test depends on those before it.

    One thread: tiny tensors are faster, and results do not depend on the machine's cores.
    """
    torch.set_num_threads(1)
    environment, logger = dict(os.environ), logging.get_logger("transformers")
    level, propagates = logger.level, logger.propagate
    bars, bars_of_data = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    logger.setLevel(level)
    logger.propagate = propagates
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    (datasets.disable_progress_bars if bars_of_data else datasets.enable_progress_bars)()
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()
