"""A stage of the concatenating twin: TRL's own trainer on our rows and recipes, in a folder like our stages'.

`run_twin_stage` resumes as `run_stage` does and writes the same `agevlm_stage.json`, so that a finished run is not
done again and one of another recipe is refused. What it leaves out: guidance (the twin has no maps of its own),
shards, publishing.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from agevlm.conversion.twin import ConcatenatingCollator
from agevlm.models import load, load_processor
from agevlm.store import as_json, check_same
from agevlm.training.checkpoints import newest_checkpoint, publish_files, remove_leftovers, staging_folder
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.freezing import set_trainable
from agevlm.training.lineage import (
    LINEAGE_FILE,
    data_fingerprint,
    git_commit,
    identity_hash,
    library_versions,
    model_fingerprint,
    parent_lineage,
    read_lineage,
    training_identity,
    write_lineage,
)
from agevlm.training.stages.base import StageRecipe


def run_twin_stage(
    recipe: StageRecipe,
    output: Path,
    rows: Dataset,
    init_from: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train one stage of the twin into `output`, go on with it, or find it done.

    Raises:
        ValueError: a guided recipe, or a folder that belongs to another run.
    """
    if recipe.training["guidance_weight"]:
        raise ValueError(f"{recipe.name}: the concatenating twin has no cross-attention to guide; set guidance to 0")
    args = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=str(output)))
    model, processor = load(init_from, dtype=torch.float32, device_map=None)
    identity = as_json(
        {
            "stage": recipe.stage,
            "variant": "twin",
            "trains": recipe.trains,
            "frozen": recipe.frozen,
            "training": training_identity(args),
            "data": data_fingerprint(rows),
            "parent_weights": model_fingerprint(model),
        }
    )
    earlier = read_lineage(output)
    if earlier is not None:
        check_same(output, earlier["recipe"], identity, "recipe's run")
    if earlier is not None and earlier["status"] == "finished":
        return
    lineage = {
        "name": recipe.name,
        "stage": recipe.stage,
        "variant": "twin",
        "size": recipe.size,
        "status": "unfinished",
        **parent_lineage(init_from),
        "recipe_hash": identity_hash(identity),
        "recipe": identity,
        "git_commit": git_commit(),
        "versions": library_versions(),
    }
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    write_lineage(output, lineage)
    set_trainable(model, recipe.trains, recipe.frozen)
    trainer = SFTTrainer(
        model,
        args,
        ConcatenatingCollator(processor, args.max_length, args.pad_to_multiple_of),
        train_dataset=rows,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = _checkpoint(output)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    staged = staging_folder(output) / "final"
    trainer.save_model(str(staged))
    # The tokenizer that trained carries its last call's truncation and padding into its files; a fresh one does not.
    load_processor(init_from).save_pretrained(staged)
    # Trainer pickles its arguments beside the weights; the lineage holds what counts of them.
    (staged / "training_args.bin").unlink(missing_ok=True)
    trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
    write_lineage(staged, {**lineage, "status": "finished"})
    publish_files(staged, output, last=LINEAGE_FILE)
    remove_leftovers(output)


def _checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint. Trainer writes its state last; a folder without it was cut short."""
    while (found := newest_checkpoint(output)) is not None and not (found / TRAINER_STATE_NAME).exists():
        shutil.rmtree(found)
    return found
