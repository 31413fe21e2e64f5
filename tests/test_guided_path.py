"""The way of appendix A on tiny models of the real classes: text -> masks -> guided stage 3 -> where it looks."""

import json
import shlex
import shutil

import builders_grounding as tiny
import pytest
from datasets import Dataset

from agevlm.cli import dispatch
from agevlm.data.masks import load_masks
from agevlm.data.scenes.build import load_rows
from builders import save_tiny, tiny_scenes


ANY_MASK = ("--min-area", "0", "--max-area", "1", "--min-score", "-1")  # random weights score around 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes without masks of their own, a checkpoint, and what `agevlm ground` makes of the captions."""
    root = tmp_path_factory.mktemp("path")
    tiny_scenes(root / "scenes", captions=12, test=12, size=96)
    shutil.rmtree(root / "scenes" / "masks")
    save_tiny(root / "start")
    parts = ["--grounder", str(tiny.florence2(root / "florence2")), "--segmenter", str(tiny.sam(root / "sam"))]
    captions, masks = str(root / "scenes" / "captions"), str(root / "masks")
    common = ["--backend", "florence2+sam", "--model", str(root / "start"), "--workers", "0", "--max-new-tokens", "24"]
    dispatch(["ground", captions, "--output", masks, *common, *parts, *ANY_MASK])
    return root


def train(folder, *more: str) -> dict:
    """What the finished folder says of itself."""
    output = folder / f"stage3-{len(list(folder.iterdir()))}"
    data = ["--data", str(folder / "scenes"), "--init-from", str(folder / "start"), "--output-dir", str(output)]
    steps = shlex.split("--max-steps 2 --logging-steps 1 --per-device-train-batch-size 4 --disable-tqdm True")
    dispatch(["train", "stage3_ground", "--size", "tiny", *data, *steps, *more])
    return {"folder": output, **json.loads((output / "agevlm_stage.json").read_text())}


def test_masks_from_texts_guide_stage_3_and_looking_is_measured(folder):
    kept = len(load_masks([folder / "masks"]))
    assert 4 <= kept <= 12
    stage = train(folder, "--masks", str(folder / "masks"))
    assert stage["data"]["guided_rows"] == kept
    assert stage["metrics"]["guided_share"] > 0 and stage["metrics"]["guidance_loss"] > 0
    evaluation = folder / "evaluation"
    common = ["--scenes", str(folder / "scenes"), "--benchmarks", "pope", "--output", str(evaluation)]
    dispatch(["eval", str(stage["folder"]), *common])
    measured = json.loads((evaluation / stage["folder"].name / "metrics.json").read_text())
    looked = measured["grounding"]
    assert looked["n"] == 6 and 0 < looked["in_mask_mass"]["mean"] < 1


def test_masks_may_lie_in_the_data_or_in_several_sets(folder):
    """All ways give the same rows the same masks, hence the same weights."""
    everything = load_masks([folder / "masks"])
    for number, part in enumerate((everything.select(range(3)), everything.select(range(3, len(everything))))):
        part.to_parquet(folder / f"set{number}.parquet")
    several = train(folder, "--masks", str(folder / "set0.parquet"), str(folder / "set1.parquet"))
    shutil.copytree(folder / "masks", folder / "scenes" / "masks")
    try:
        beside = train(folder)
    finally:
        shutil.rmtree(folder / "scenes" / "masks")
    assert several["data"]["guided_rows"] == beside["data"]["guided_rows"] == len(everything)
    assert several["metrics"]["loss"] == beside["metrics"]["loss"]


def test_two_sets_of_masks_in_one_folder_are_refused(folder, tmp_path):
    scenes = tmp_path / "scenes"
    shutil.copytree(folder / "scenes", scenes)
    shutil.copytree(folder / "masks", scenes / "masks")
    load_masks([folder / "masks"]).to_parquet(scenes / "masks" / "captions.parquet")
    with pytest.raises(ValueError, match=r"several sets of masks .*captions.*kept.*; say which one by --masks"):
        load_rows(scenes, "captions")
    assert len(load_rows(scenes, "captions", masks=load_masks([folder / "masks"]))) == 12


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_guided_stage_without_masks_is_refused(folder, dry):
    with pytest.raises(ValueError, match=r"none of the 12 rows brings a mask.*--masks MASKS.*--variant ca-baseline"):
        train(folder, *dry)


def test_a_form_that_cannot_carry_masks_is_refused_before_a_model_is_loaded(folder, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no place for them.*agevlm data import .*--masks.*--variant ca-baseline"):
        train(folder, "--data", str(tmp_path / "rows.json"), "--init-from", str(tmp_path / "nothing"))


def test_the_baseline_needs_no_masks(folder, capsys):
    stage = train(folder, "--variant", "ca-baseline")
    assert "the masks guide nothing" not in capsys.readouterr().out
    train(folder, "--variant", "ca-baseline", "--masks", str(folder / "masks"))
    assert "the masks guide nothing" in capsys.readouterr().out
    assert stage["data"]["guided_rows"] == 0 and "guidance_loss" not in stage["metrics"]


def test_a_refused_run_is_refused_again(folder):
    """No mask can guide: the second call finds the checkpoint of the last step and must not call it finished."""
    cut = ("--masks", str(folder / "masks"), "--max-length", "8", "--output-dir", str(folder / "refused"))
    for message in (r"\d+ of \d+ rows with a mask could not be guided", r"None of the \d+ rows with a mask"):
        with pytest.raises(ValueError, match=message):
            train(folder, *cut)
    assert json.loads((folder / "refused" / "agevlm_stage.json").read_text())["status"] != "finished"


def test_masks_of_another_set_are_refused(folder, tmp_path):
    masks = load_masks([folder / "masks"])
    foreign = masks.map(lambda row: {"id": f"foreign-{row['id']}"})
    Dataset.to_parquet(foreign, tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="masks fit no row"):
        train(folder, "--masks", str(tmp_path / "foreign.parquet"))
