"""What these tests load as data sets is cached in pytest's folder and not in the user's; rows with exact masks."""

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from agevlm.data.rows import ROW_FEATURES


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def write_files(tmp_path):
    """Writes rows, each a caption and the size and box of its mask (None: no mask), and the masks as Parquet files."""

    def write(captions, sizes, boxes) -> tuple[str, str]:
        generator = np.random.default_rng(0)
        rows, masks = [], []
        for number, (caption, (width, height), box) in enumerate(zip(captions, sizes, boxes, strict=True)):
            picture = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
            messages = [{"role": "user", "content": "<|image|>What is it?"}, {"role": "assistant", "content": caption}]
            rows.append({"id": f"r{number}", "images": [picture], "messages": messages})
            mask = Image.new("1", picture.size)
            mask.paste(1, box or (0, 0, 0, 0))
            masks.append({"id": f"r{number}", "mask": mask if box else None})
        paths = tmp_path / "rows.parquet", tmp_path / "masks.parquet"
        Dataset.from_list(rows, features=ROW_FEATURES).to_parquet(paths[0])
        features = Features({"id": ROW_FEATURES["id"], "mask": ImageFeature()})
        Dataset.from_list(masks, features=features).to_parquet(paths[1])
        return str(paths[0]), str(paths[1])

    return write
