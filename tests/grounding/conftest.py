"""What these tests load as data sets is cached in pytest's folder and not in the user's."""

import datasets
import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before
