"""Both systems, published and converted, made once for all tests of the baselines; nobody may change them."""

import published_baselines as published
import pytest
from tiny_baselines import SYSTEMS, Published
from transformers import AutoModelForImageTextToText, AutoProcessor

from agevlm.conversion import cli


@pytest.fixture(scope="session")
def words() -> bytes:
    return published.sentencepiece_model()


@pytest.fixture(scope="session")
def vocabulary(words) -> int:
    return published.sentencepiece.SentencePieceProcessor(model_proto=words).vocab_size()


@pytest.fixture(scope="session", params=SYSTEMS)
def pair(request, tmp_path_factory, words, vocabulary):
    """A published checkpoint and the folder that it was converted to; ConvLLaVA's from pickles."""
    folder = tmp_path_factory.mktemp(request.param)
    original = Published(folder, request.param, words, vocabulary, bins=request.param == "convllava")
    flags = ["--read-bin"] if request.param == "convllava" else []
    converted = folder / request.param  # models are called after their folders
    cli.main([request.param, str(original.folder), str(converted), *flags])
    return original, converted


@pytest.fixture(scope="session")
def loaded(pair):
    original, folder = pair
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return original, model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
