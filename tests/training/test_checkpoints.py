"""A checkpoint is complete or not there, under failures at any point of saving."""

import json
import os
from pathlib import Path

import pytest
from training_worker import make_trainer
from transformers import AutoModel, AutoProcessor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from agevlm.training.checkpoints import (
    STAGING,
    publish_files,
    publish_folder,
    remove_leftovers,
    staging_folder,
)
from agevlm.training.trainer import AgeVlmSFTTrainer
from builders import same, save_tiny


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_a_complete_folder(tmp_path):
    """Its code is what any saved model has, which `test_remote_code.py` loads where the package is missing."""
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.lineage = {"name": "stage3_ground", "stage": 3}
    trainer.train()
    assert visible(tmp_path) == ["README.md", "checkpoint-2", "checkpoint-4"]
    checkpoint = tmp_path / "checkpoint-4"
    expected = {
        "config.json",
        "model.safetensors",
        "configuration_agevlm.py",
        "modeling_agevlm.py",
        "processor_config.json",
        "processing_agevlm.py",
        "image_processing_agevlm.py",
        "tokenizer.json",
        "chat_template.jinja",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        TRAINER_STATE_NAME,
        "agevlm_stage.json",
        "README.md",
    }
    assert expected <= set(visible(checkpoint))
    assert "training_args.bin" not in visible(checkpoint)
    assert "Intermediate checkpoint" in (checkpoint / "README.md").read_text()
    assert json.loads((checkpoint / "agevlm_stage.json").read_text()) == trainer.lineage
    saved = save_tiny(tmp_path / "saved")
    code = [{path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in (checkpoint, saved)]
    assert code[0] == code[1]
    model = AutoModel.from_pretrained(checkpoint)
    AutoProcessor.from_pretrained(checkpoint)
    assert same(model.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_failure_while_saving_leaves_no_visible_checkpoint(tmp_path, monkeypatch, method):
    stock = getattr(AgeVlmSFTTrainer, method)

    def fail_after_writing(self, output_dir, *arguments):
        stock(self, output_dir, *arguments)
        if self.state.global_step == 4:
            raise OSError("disk full")

    monkeypatch.setattr(AgeVlmSFTTrainer, method, fail_after_writing)
    trainer = make_trainer(tmp_path, **SAVING)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert [name for name in visible(tmp_path) if name.startswith("checkpoint-")] == ["checkpoint-2"]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert (tmp_path / STAGING / "checkpoint-4").is_dir()

    monkeypatch.undo()
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert STAGING not in visible(tmp_path)


def test_old_checkpoints_are_removed_and_the_best_is_kept(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="in_mask_mass",
        greater_is_better=False,
        load_best_model_at_end=True,
        guidance_weight=5.0,
        learning_rate=1e-2,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_in_mask_mass" in entry]
    best = min(entries, key=lambda entry: entry["eval_in_mask_mass"])["step"]
    assert best != 6, "the test needs a best checkpoint that is not the last one"
    kept = [name for name in visible(tmp_path) if name.startswith("checkpoint-")]
    assert kept == sorted({f"checkpoint-{best}", "checkpoint-6"})
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    state = json.loads((tmp_path / "checkpoint-6" / TRAINER_STATE_NAME).read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")


# ---- Folder operations ----


def test_publishing_replaces_a_folder_whole(tmp_path):
    new, old = staging_folder(tmp_path) / "checkpoint-2", tmp_path / "checkpoint-2"
    for folder, name in ((new, "new"), (old, "old")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    publish_folder(new, old)
    assert visible(old) == ["new"]
    remove_leftovers(tmp_path)
    assert visible(tmp_path) == ["checkpoint-2"]


def test_publishing_files_moves_the_decisive_one_last(tmp_path, monkeypatch):
    source, target, moved = tmp_path / "source", tmp_path / "target", []
    for folder in (source, target):
        folder.mkdir()
        for name in ("a.json", "b.json", "c.json"):
            (folder / name).write_text(folder.name)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    publish_files(source, target, last="a.json")
    assert moved == ["b.json", "c.json", "a.json"]
    assert {path.read_text() for path in target.iterdir()} == {"source"}
