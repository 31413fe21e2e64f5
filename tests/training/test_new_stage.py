"""A stage that this repository does not have, added as CONTRIBUTING says: its recipe, one line of `STAGES`, one line
of the model card's table."""

import json

import torch
from safetensors.torch import load_file

from agevlm.data.scenes.build import build_scenes
from agevlm.hub_cards import render
from agevlm.training.freezing import part_of
from agevlm.training.stages import STAGES
from agevlm.training.stages.recipe import CAMBRIAN_INSTRUCTIONS, build_recipe
from agevlm.training.train import main
from builders import save_tiny


def polish(size: str = "paper", variant: str = "agevlm", freeze_self_attention: bool = False):
    """Stage 5: the projector alone, on instructions."""
    return build_recipe(
        name="stage5_polish",
        stage=5,
        goal="polish the projector",
        size=size,
        variant=variant,
        trains=("projector",),
        frozen=("self_attention",) if freeze_self_attention else (),
        data="instructions",
        paper_rows=CAMBRIAN_INSTRUCTIONS,
        mask_fraction=0.0,
    )


def test_a_recipe_and_two_lines_are_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STAGES, "stage5_polish", polish)
    monkeypatch.setattr(render, "STAGES", (*render.STAGES, (5, "stage5-polish", "projector", "language modeling")))
    start, out, scenes = tmp_path / "start", tmp_path / "out", tmp_path / "scenes"
    save_tiny(start)
    build_scenes(scenes, captions=4, instructions=16, test=4, size=96, max_objects=3, progress=False)

    planned = main(["stage5_polish", "--dry_run", "--freeze_self_attention", "--output_dir", str(tmp_path / "never")])
    assert planned.lineage["resolved"]["trains"] == "projector without self_attention"
    assert "polish the projector" in capsys.readouterr().out

    command = ["stage5_polish", "--size", "tiny", "--data", str(scenes), "--init_from", str(start)]
    result = main([*command, "--output_dir", str(out), "--max_steps", "2", "--disable_tqdm", "True"])
    assert (result.status, result.lineage["stage"], result.lineage["data"]["rows"]) == ("trained", 5, 16)
    assert main([*command, "--output_dir", str(out), "--max_steps", "2"]).status == "already finished"
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part_of(name) for name in moved} == {"projector"}
    assert json.loads((out / "agevlm_stage.json").read_text())["name"] == "stage5_polish"
    card = (out / "README.md").read_text()
    assert "| **5, this one** | `stage5-polish` |" in card and "Intermediate checkpoint" not in card
