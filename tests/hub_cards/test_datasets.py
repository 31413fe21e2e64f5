"""Cards of data sets: what they name loads, and what they count is there."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, Features, load_dataset
from huggingface_hub import DatasetCard

from agevlm.data.rows import MASK_FEATURES, ROW_FEATURES
from agevlm.data.scenes.build import build_scenes
from agevlm.hub_cards.cli import main
from builders import mask, row


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    return build_scenes(folder, captions=8, instructions=8, test=4, size=96, max_objects=3, progress=False)


def test_every_part_of_the_scenes_loads_by_its_name_and_the_numbers_are_those_of_the_files(scenes, tmp_path, capsys):
    main([str(scenes)])
    assert "README.md" in capsys.readouterr().out
    card = DatasetCard.load(scenes / "README.md")
    configurations = {config["config_name"]: config["data_files"][0] for config in card.data["configs"]}
    assert {"captions", "instructions", "masks_captions", "masks_instructions", "name_pope"} <= configurations.keys()
    assert len(configurations) == len(list(scenes.glob("**/*.parquet")))
    for name in ("captions", "masks_captions", "name_pope"):
        rows = load_dataset(str(scenes), name, split=configurations[name]["split"], cache_dir=str(tmp_path))
        assert f"| `{name}` | {configurations[name]['split']} | {len(rows)} |" in card.text
        assert rows[0]["id"]
    assert "| `masks_captions` | train | 8 | scenes: 8 |" in card.text
    assert "![Examples](contact_sheet.png)" in card.text and (scenes / "contact_sheet.png").is_file()
    assert card.data.size_categories == "n<1K" and "synthetic" in card.data.tags
    assert "{{" not in card.content and "None" not in card.content


def test_masks_alone_and_rows_in_shards(tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    for shard, sources in enumerate((["sam", "sam"], ["florence"])):
        items = [
            {"id": f"{shard}-{n}", "query": "q", "message_index": 0, "mask": mask(), "source": source, "score": 0.9}
            for n, source in enumerate(sources)
        ]
        path = folder / f"train-0000{shard}-of-00002.parquet"
        Dataset.from_list(items, features=Features(MASK_FEATURES)).to_parquet(path)
    main([str(folder)])
    card = DatasetCard.load(folder / "README.md")
    assert card.text.lstrip().startswith("# Guidance masks")
    assert "| `default` | train | 3 | sam: 2, florence: 1 |" in card.text
    assert len(load_dataset(str(folder), "default", split="train", cache_dir=str(tmp_path / "cache"))) == 3

    rows = tmp_path / "rows" / "captions"
    rows.mkdir(parents=True)
    item = {name: value for name, value in row().items() if name in ROW_FEATURES}
    Dataset.from_list([item], features=Features(ROW_FEATURES)).to_parquet(rows / "train-00000-of-00001.parquet")
    main([str(rows.parent)])
    text = DatasetCard.load(rows.parent / "README.md").text
    assert text.lstrip().startswith("# Rows of AGE-VLM") and "| `captions` | train | 1 |" in text


def test_a_damaged_manifest_is_named_and_no_card_is_written(scenes, tmp_path):
    (tmp_path / "scenes.json").write_text(json.dumps({})[:1])
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "train.parquet").write_bytes((scenes / "captions" / "train.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"scenes\.json is no valid JSON"):
        main([str(tmp_path)])
    assert not (tmp_path / "README.md").exists()
