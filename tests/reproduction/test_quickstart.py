"""The quickstart: equal conditions for all variants, shared work that is really the same, and the whole chain once."""

import dataclasses
import json
from pathlib import Path

import pytest

from agevlm.reproduction import cli, quickstart
from agevlm.training.parts import load_parts
from agevlm.training.stages import stage1_align, stage2_adapt_vision, stage3_ground


ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "checkpoints" / "tiny-parts"


def without_variant(recipe):
    return dataclasses.replace(recipe, variant="")


def test_shared_stages_are_the_same_recipe_for_every_variant():
    for size in quickstart.SIZES:
        for stage in (stage1_align, stage2_adapt_vision):
            recipes = [without_variant(stage.recipe(size=size, variant=variant)) for variant in quickstart.VARIANTS]
            assert recipes[0] == recipes[1] == recipes[2]
        guided = [without_variant(stage3_ground.recipe(size=size, variant=v)) for v in ("agevlm", "agevlm-lm")]
        assert guided[0] == guided[1]


@pytest.mark.parametrize("size", list(quickstart.SIZES))
def test_variants_differ_in_guidance_alone(size):
    """Same stages, data, steps, batch and learning rates; only the guidance weight differs, as in Table 1."""
    runs = quickstart.plan(size, seed=3)
    weights = {}
    paths = {variant: quickstart.path_of(variant, runs) for variant in quickstart.VARIANTS}
    for variant, path in paths.items():
        assert [run.recipe.stage for run in path] == [1, 2, 3, 4]
        weights[variant] = [run.recipe.training["guidance_weight"] for run in path]
        for run, other in zip(path, paths["agevlm"], strict=True):
            same = {"training": {**run.recipe.training, "guidance_weight": 0}, "variant": ""}
            assert dataclasses.replace(run.recipe, **same) == dataclasses.replace(
                other.recipe, training={**other.recipe.training, "guidance_weight": 0}, variant=""
            )
    assert weights == {"ca-baseline": [0, 0, 0, 0], "agevlm": [0, 0, 1, 0], "agevlm-lm": [0, 0, 1, 1]}
    assert all(run.recipe.training["seed"] == 3 for run in runs)


def test_missing_parts_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="agevlm parts tiny --output"):
        load_parts(tmp_path)


@pytest.fixture
def minute(monkeypatch):
    """The tiny size, cut down to a minute."""
    size = dataclasses.replace(quickstart.SIZES["tiny"], captions=64, instructions=64, questions=16)
    monkeypatch.setitem(quickstart.SIZES, "tiny", size)
    return size


def test_the_whole_chain_and_once_more(minute, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["--output", str(output), "--parts", str(PARTS)]
    cli.quickstart(arguments)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    page = (output / "report.html").read_text(encoding="utf-8")
    for variant in quickstart.VARIANTS:
        assert quickstart.TITLES[variant] in page
        folder = output / "seed-0" / f"stage4-{variant}"
        assert {"config.json", "model.safetensors", "modeling_agevlm.py", "processing_agevlm.py", "README.md"} <= {
            path.name for path in folder.iterdir()
        }
    assert report["settings"]["size"] == "tiny"
    weights = (output / "seed-0" / "stage4-agevlm" / "model.safetensors").stat().st_mtime_ns
    cli.quickstart(arguments)  # finds everything done
    assert (output / "seed-0" / "stage4-agevlm" / "model.safetensors").stat().st_mtime_ns == weights
