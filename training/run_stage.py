"""Runs a stage's recipe (`recipe.py`) in its own folder: the same call again resumes an interrupted run, or finds it
done."""

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from agevlm.data.masks import join_masks, load_masks, mask_places, share_of_masks
from agevlm.data.published.prepare import prepare
from agevlm.data.rows import undecoded
from agevlm.data.scenes.build import load_rows
from agevlm.language import HeldText, read_held_text
from agevlm.processing import AgeVlmProcessor
from agevlm.store import check_same
from agevlm.training.adapters import AdapterArguments, load_start, merge
from agevlm.training.callbacks import MeasureLanguage
from agevlm.training.checkpoints import (
    publish_files,
    remove_checkpoints,
    remove_leftovers,
    staging_folder,
)
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.curve import LearningCurve, read_questions
from agevlm.training.dry_run import print_dry_run
from agevlm.training.features import use_stored_features, why_not
from agevlm.training.freezing import set_trainable
from agevlm.training.lineage import LINEAGE_FILE, describe_run, earlier_lineage, write_lineage
from agevlm.training.on_cpu import attention_kernel
from agevlm.training.publish import publish_stage, warn_early
from agevlm.training.sampling import BY_LENGTH, check_guided
from agevlm.training.stage_trainer import StageTrainer
from agevlm.training.stages.recipe import TWIN, TWINS, StageRecipe
from agevlm.training.step_bar import use_step_bar
from agevlm.training.streaming import load_shards
from agevlm.training.trainer import AgeVlmSFTTrainer
from agevlm.training.twin import TwinTrainer, check_twin, load_twin


@dataclass
class StageResult:
    """What `run_stage` returns.

    Args:
        status: `trained`, `already finished` or `dry run`.
        output_dir: the finished folder: model, code, processor, card, lineage and `trainer_state.json`.
        lineage: what `agevlm_stage.json` holds (of a dry run: what it would hold).
        log_history: Trainer's log entries, from first to last step, also across interruptions.
    """

    status: str
    output_dir: Path
    lineage: dict[str, Any]
    log_history: list[dict[str, float]]


def run_stage(
    recipe: StageRecipe,
    output_dir: str | os.PathLike,
    *,
    data: str | Path | Dataset | None = None,
    masks: Sequence[str | Path] = (),
    init_from: str | Path | None = None,
    revision: str | None = None,
    model: PreTrainedModel | None = None,
    processor: AgeVlmProcessor | None = None,
    eval_data: Dataset | None = None,
    language: str | Path | None = None,
    stored_features: str | Path | None = None,
    answers: str | Path | Dataset | None = None,
    args: AgeVlmSFTConfig | None = None,
    adapters: AdapterArguments | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    name: str | None = None,
    resume: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> StageResult:
    """Train one stage into `output_dir`, resume it, or find it done.

    Args:
        data: folder or URL of a data set (`agevlm data scenes`, or shards: `training/streaming.py`), a published one
            (`agevlm.data.published.prepare`), or rows that are joined with their masks already.
        masks: sets of masks (`agevlm.data.masks.load_masks`) to join in place of those in `data`.
        init_from, revision: Hub repository or folder to start from.
        model, processor: to start from objects instead. The model is trained in place.
        eval_data: rows for `eval_strategy`.
        language: place of a held text (`agevlm.language.read_held_text`) whose perplexity is measured before the first
            step and after the last one, for lineage and card.
        stored_features: folder in which the frozen vision tower's output for each picture is stored, or found, and
            from which it is read (`features.py`). It changes the speed alone; runs may share the folder.
        answers: yes/no questions (`agevlm.training.curve.read_questions`) that are answered before the first step,
            every `args.answer_steps` and after the last one, for the log.
        args: training arguments; by default those of the recipe. Their `output_dir` is replaced.
        adapters: train adapters (LoRA) on the language model in place of its weights; stage 4 alone.
        callbacks: Trainer's.
        name: of the progress bar; by default the stage's.
        resume: continue from the newest checkpoint. Otherwise an unfinished run of the folder is started again.
        dry_run: print the resolved configuration, what trains, counts and steps, and change nothing.

    Raises:
        ValueError: nothing to start from, no data, no held text, no questions, guidance without a mask, stored
            features of a tower that trains, or a folder that belongs to something else; the message says which fields.
    """
    output_dir = Path(output_dir)
    if args is None:
        args = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=str(output_dir)))
    console = console or Console(quiet=args.process_index > 0, markup=False)
    args.output_dir = str(output_dir)
    adapters = adapters or AdapterArguments()
    adapters.check(recipe.name, recipe.trains, init_from, args)
    adapters = copy(adapters)
    adapters.attn_implementation = adapters.attn_implementation or attention_kernel(args)
    reason = why_not(recipe, args, adapters.use_peft) if stored_features is not None else None
    if reason is not None:
        raise ValueError(f"`--stored-features` {stored_features}: {reason}. Leave it out.")
    is_twin = recipe.variant in TWINS
    if is_twin:
        check_twin(recipe, args, adapters, dry_run)
    rows = _load_data(recipe, args, data, masks)
    if rows is not None and not is_twin:
        check_guided(rows, args.guidance_weight)
    if masks and args.guidance_weight == 0:
        console.print(f"{recipe.name}: the masks guide nothing, `guidance_weight` is 0.", style="yellow")
    if model is None and init_from is not None and not dry_run:
        if is_twin:
            model, processor = load_twin(init_from, revision or "main", recipe, console)
        else:
            model, processor = load_start(init_from, revision, adapters)
    if dry_run:
        lineage = print_dry_run(recipe, args, rows, model, init_from, revision, adapters, console)
        return StageResult("dry run", output_dir, lineage, [])
    if model is None or processor is None:
        raise ValueError(
            "Nothing to start from: give `init_from` (a folder or repository), or `model` and `processor`."
        )
    if rows is None:
        raise ValueError("No data: give `data`, the folder that `agevlm data scenes` has written, or rows.")

    if is_twin:
        recipe = recipe.override(variant=TWIN)  # from here on its weights say of which size it is
    held = None if language is None else read_held_text(language, processor)
    questions = None if answers is None else read_questions(answers)
    lora = adapters.lora(model.config, recipe.frozen)
    lineage = describe_run(recipe, args, rows, model, init_from, revision, adapters.identity(lora))
    earlier = earlier_lineage(output_dir, lineage["recipe"])
    checkpoint = get_last_checkpoint(output_dir) if resume and earlier is not None else None
    before = earlier or {}
    goes_on = checkpoint is not None or before.get("status") == "finished"
    if questions is not None and goes_on and "answers" not in before:
        console.print(f"{recipe.name}: it began without a learning curve; a run in another folder would have one.")
        questions = None
    if earlier is not None and earlier["status"] == "finished":
        console.print(f"{recipe.name}: {output_dir} is finished (recipe {lineage['recipe_hash']}), nothing to do.")
        if held is not None and "language" not in earlier:
            console.print(f"{recipe.name}: its language ability was not measured; a run in another folder would.")
        publish_stage(output_dir, args, init_from, console)
        return StageResult("already finished", output_dir, earlier, read_log(output_dir))
    # All processes have looked at the folder before one of them changes it.
    args.distributed_state.wait_for_everyone()
    if held is not None:
        lineage["language"] = _language(held, output_dir, earlier if checkpoint is not None else None)
    if questions is not None:
        if checkpoint is not None:
            check_same(output_dir, before["answers"], questions.stated, "learning curve")
        lineage["answers"] = questions.stated
    if args.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        if not resume:
            remove_checkpoints(output_dir)
        write_lineage(output_dir, lineage)
    if checkpoint is not None:
        console.print(f"{recipe.name}: goes on from {Path(checkpoint).name}.")
    warn_early(args, console)

    if lora is None:
        set_trainable(model, recipe.trains, recipe.frozen)
    trainer = (TwinTrainer if is_twin else AgeVlmSFTTrainer)(
        model=model,
        args=args,
        lineage=lineage,
        train_dataset=rows if stored_features is None else undecoded(rows),
        eval_dataset=eval_data,
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=lora,
    )
    bar = use_step_bar(trainer, name or recipe.name)
    if held is not None:
        trainer.add_callback(MeasureLanguage(trainer, held))
    if questions is not None:
        trainer.add_callback(LearningCurve(trainer, questions, args.answer_steps))
    try:
        if stored_features is not None:
            use_stored_features(trainer, stored_features, partial(console.print, soft_wrap=True))
        trainer.train(resume_from_checkpoint=checkpoint)
        for listed, outcome in (
            (trainer.skipped, "were left out"),
            (trainer.unguided, "guided nothing"),
            (trainer.partly, "were guided by the others"),
        ):
            if listed.rows:
                console.print(
                    f"{len(listed.rows)} rows {listed.what} and {outcome}: {listed.path(output_dir)} says "
                    "which and why.",
                    style="yellow",
                    soft_wrap=True,
                )
        guiding = lineage["data"]["guided_rows"] - len(trainer.unguided.rows)
        shares = [entry["guided_share"] for entry in trainer.state.log_history if "guided_share" in entry]
        if trainer.unguided.rows and (not guiding or not any(shares)):  # a resumed run may have seen fewer rows
            raise ValueError(
                f"None of the {len(trainer.unguided.rows)} rows with a mask could be guided: "
                f"{trainer.unguided.path(output_dir)} says why."
            )
        lineage = trainer.lineage = {
            **lineage,
            "data": {**lineage["data"], "guided_rows": guiding},
            "status": "finished",
            "metrics": _last_metrics(trainer.state.log_history),
        }
        if lora is not None:
            trainer.model = merge(trainer.model, init_from, revision, adapters)
        _save_finished(trainer, output_dir)
    finally:
        bar.bar.close()
        trainer.release_model()
    publish_stage(output_dir, args, init_from, console)
    return StageResult("trained", output_dir, lineage, list(trainer.state.log_history))


def _load_data(
    recipe: StageRecipe, args: AgeVlmSFTConfig, data: str | Path | Dataset | None, masks: Sequence[str | Path]
) -> Dataset | None:
    joined = load_masks(masks) if masks else None
    if data is None or isinstance(data, Dataset):
        if joined is not None and data is not None:
            guided = len(mask_places(joined)[0])
            data = join_masks(data, joined, share_of_masks(recipe.mask_fraction, len(data), guided))
        return data
    if isinstance(data, IterableDataset):
        raise ValueError("An `IterableDataset` cannot be resumed. Give a folder of Parquet shards.")
    data = prepare(data, recipe.data, args.guidance_weight > 0 and not masks and recipe.variant not in TWINS)
    by_length = args.train_sampling_strategy == BY_LENGTH
    shards = load_shards(str(data), recipe.data, recipe.mask_fraction, by_length, joined, recipe.by_phrase)
    if shards is not None:
        return shards
    fraction, by_phrase = recipe.mask_fraction, recipe.by_phrase
    return undecoded(load_rows(data, recipe.data, fraction, masks=joined, by_phrase=by_phrase))


def _language(held: HeldText, output_dir: Path, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """The lineage's entry on the language ability: `before` is that of an interrupted run. Raises ValueError if that
    has measured another text."""
    there = (earlier or {}).get("language")
    if there is not None:
        check_same(output_dir, {name: there[name] for name in held.stated}, held.stated, "held text")
    return {**held.stated, "before": (there or {}).get("before"), "after": None}


def _save_finished(trainer: StageTrainer, output_dir: Path) -> None:
    """Save model, processor, card, log and lineage into `output_dir`; the lineage comes last and says `finished`."""
    staged = staging_folder(output_dir) / "final"
    trainer.save_model(str(staged), _internal_call=True)
    if trainer.args.should_save:
        if trainer.state.best_model_checkpoint:
            trainer.state.best_model_checkpoint = Path(trainer.state.best_model_checkpoint).name
        trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        trainer.write_card(staged)
        publish_files(staged, output_dir, last=LINEAGE_FILE)
        remove_leftovers(output_dir)
    trainer.accelerator.wait_for_everyone()


def _last_metrics(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last logged value of each metric."""
    metrics: dict[str, float] = {}
    for entry in log_history:
        metrics.update(entry)
    noise = ["runtime", "per_second", "total_flos", "epoch", "grad_norm", "learning_rate", "train_loss"]
    noise += ["data_wait", "mfu", "memory_gib"]
    # In one order: entries of a resumed run come sorted from its checkpoint
    return {name: value for name, value in sorted(metrics.items()) if not any(part in name for part in noise)}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Trainer's log of a finished stage."""
    return TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
