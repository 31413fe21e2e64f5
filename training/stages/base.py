"""Stage recipes (paper Table 1, sections 3.2.3 and 4, appendix B) and the function that runs one.

A recipe is one complete, frozen description of a stage; variants and sizes are the same recipe with named fields
changed. What the paper does not state is decided here once: beta1 0.9 and the cosine schedule are the usual choice of
the models it builds on; the number of masks follows its counts (77K, 150K) rather than its percentages, which
contradict them.

`run_stage` runs a recipe in its own folder: the same call again resumes an interrupted run, or finds it done.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from agevlm.data.prepare import prepare
from agevlm.data.scenes import load_rows
from agevlm.hub_cards import write_card
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor
from agevlm.training.checkpoints import newest_checkpoint, publish_files, remove_leftovers, staging_folder
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.freezing import format_table, set_trainable, trainable_table
from agevlm.training.lineage import (
    LINEAGE_FILE,
    as_json,
    changed_fields,
    data_fingerprint,
    git_commit,
    identity_hash,
    library_versions,
    parent_lineage,
    read_lineage,
    training_identity,
    weights_fingerprint,
    write_lineage,
)
from agevlm.training.publish import publish_stage, warn_early
from agevlm.training.sampling import BY_LENGTH
from agevlm.training.streaming import load_shards
from agevlm.training.trainer import AgeVlmSFTTrainer


VARIANTS = ("agevlm", "agevlm-lm", "ca-baseline")
SIZES = ("paper", "small", "tiny")

CAMBRIAN_CAPTIONS, CAMBRIAN_INSTRUCTIONS = 2_500_000, 10_000_000
CAPTION_MASKS, INSTRUCTION_MASKS = 77_000, 150_000

PAPER_TRAINING = {
    "learning_rate": 1e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "bf16": True,
    "activation_checkpointing": True,
    "dataloader_num_workers": 8,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "loss_spike": 10.0,
}
SOURCES = {
    "trains": "Table 1",
    "guidance_weight": "Table 1, section 3.2.2",
    "mask_fraction": "sections 3.2.2 and 4: 77K of 2.5M captions, 150K of 10M instructions",
    "learning_rate": "appendix B",
    "adam_beta2": "appendix B",
    "weight_decay": "appendix B",
    "warmup_steps": "appendix B",
    "num_train_epochs": "appendix B",
    "per_device_train_batch_size": "section 4: 16 per GPU",
    "global_batch_size": "section 4: 16 on each of 8 GPUs",
    "adam_beta1": "not stated in the paper",
    "lr_scheduler_type": "not stated in the paper",
    "bf16": "not stated in the paper",
}
# Small data sets have few masks: with the paper's fractions a stage would see a handful.
SMALLER: dict[str, dict[str, Any]] = {
    "small": {
        "global_batch_size": 32,
        "mask_fraction": 1.0,
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 32,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_num_workers": 0,
        "save_steps": 200,
        "loss_spike": None,
    },
    "tiny": {
        "global_batch_size": 16,
        "mask_fraction": 1.0,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_num_workers": 0,
        "save_steps": 100,
        "loss_spike": None,
    },
}


@dataclass(frozen=True)
class StageRecipe:
    """One stage of one variant at one size.

    Args:
        name, stage, goal: `stage1_align`, 1, one sentence.
        variant: `agevlm`, `agevlm-lm` or `ca-baseline`.
        size: `paper`, `small` or `tiny`.
        trains, frozen: parts that train, and parts taken out of them again (`training/freezing.py`).
        data: part of the data set, `captions` or `instructions`.
        paper_rows: how many rows the paper trains on, for a dry run without data.
        mask_fraction: share of rows that bring their mask.
        global_batch_size: rows per optimizer step over all devices and accumulated batches.
        training: keyword arguments of `AgeVlmSFTConfig`.
    """

    name: str
    stage: int
    goal: str
    variant: str
    size: str
    trains: tuple[str, ...]
    data: Literal["captions", "instructions"]
    paper_rows: int
    mask_fraction: float
    frozen: tuple[str, ...] = ()
    global_batch_size: int = 128
    training: Mapping[str, Any] = field(default_factory=dict)

    def override(self, **changes: Any) -> "StageRecipe":
        """The recipe with fields changed: its own fields, or arguments of `AgeVlmSFTConfig`."""
        own = {name: changes.pop(name) for name in list(changes) if name in RECIPE_FIELDS}
        unknown = set(changes) - CONFIG_FIELDS
        if unknown:
            raise ValueError(f"Neither a recipe nor `AgeVlmSFTConfig` has the fields {', '.join(sorted(unknown))}.")
        return dataclasses.replace(self, training={**self.training, **changes}, **own)

    def training_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Keyword arguments of `AgeVlmSFTConfig` on this machine.

        Without an accelerator training runs on the CPU. Gradients are accumulated so that a step has
        `global_batch_size` rows on however many devices, unless `overrides` set the accumulation.

        Raises:
            ValueError: the devices' batches do not divide the global batch.
        """
        arguments = {"use_cpu": not torch.accelerator.is_available(), **self.training, **overrides}
        if "gradient_accumulation_steps" not in arguments:
            devices = int(os.environ.get("WORLD_SIZE", "1"))
            at_once = arguments["per_device_train_batch_size"] * devices
            if self.global_batch_size % at_once:
                raise ValueError(
                    f"{devices} device(s) with `per_device_train_batch_size="
                    f"{arguments['per_device_train_batch_size']}` do not divide the recipe's batch of "
                    f"{self.global_batch_size}. Choose a divisor, or set `gradient_accumulation_steps`."
                )
            arguments["gradient_accumulation_steps"] = self.global_batch_size // at_once
        return arguments


RECIPE_FIELDS = {item.name for item in dataclasses.fields(StageRecipe)} - {"training"}
CONFIG_FIELDS = {item.name for item in dataclasses.fields(AgeVlmSFTConfig)}


def build_recipe(
    *,
    size: str,
    variant: str,
    guided_variants: Sequence[str] = (),
    smaller: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> StageRecipe:
    """The recipe of a stage script.

    Args:
        guided_variants: variants whose guidance weight is 1 in this stage (Table 1); 0 for the others.
        smaller: `{size: changes}` of this stage alone, on top of what all stages change at that size.
        **fields: the fields of `StageRecipe`.

    Raises:
        ValueError: an unknown size or variant.
    """
    for name, value, known in (("size", size, SIZES), ("variant", variant, VARIANTS)):
        if value not in known:
            raise ValueError(f"Unknown {name} '{value}'. Choose from {', '.join(known)}.")
    training = {**PAPER_TRAINING, "guidance_weight": 1.0 if variant in guided_variants else 0.0}
    recipe = StageRecipe(size=size, variant=variant, training=training, **fields)
    changes = {**SMALLER.get(size, {}), **(smaller or {}).get(size, {})}
    if recipe.mask_fraction == 0:
        changes.pop("mask_fraction", None)
    return recipe.override(**changes)


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
    init_from: str | Path | None = None,
    revision: str | None = None,
    model: PreTrainedModel | None = None,
    processor: AgeVlmProcessor | None = None,
    eval_data: Dataset | None = None,
    args: AgeVlmSFTConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> StageResult:
    """Train one stage into `output_dir`, or go on with it, or find it done.

    Args:
        data: folder or URL of a data set (`agevlm data scenes`, or shards: `training/streaming.py`), a published one
            (`agevlm.data.prepare`), or rows that are joined with their masks already.
        init_from, revision: Hub repository or folder to start from.
        model, processor: to start from objects instead. The model is trained in place.
        eval_data: rows for `eval_strategy`.
        args: training arguments; by default those of the recipe. Their `output_dir` is replaced.
        callbacks: Trainer's. With `disable_tqdm` they are the only ones that report progress.
        resume: go on from the newest checkpoint. Otherwise an unfinished run of the folder is started again.
        dry_run: print the resolved configuration, what trains, counts and steps, and change nothing.

    Raises:
        ValueError: nothing to start from, no data, or a folder that belongs to something else; the message says which
            fields differ.
    """
    output_dir = Path(output_dir)
    if args is None:
        args = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=str(output_dir)))
    console = console or Console(quiet=args.process_index > 0)
    args.output_dir = str(output_dir)
    rows = _load_data(recipe, args, data)
    if model is None and init_from is not None and not dry_run:
        at = revision or "main"
        model = AgeVlmForConditionalGeneration.from_pretrained(init_from, revision=at, dtype=torch.float32)
        processor = AgeVlmProcessor.from_pretrained(init_from, revision=at)
    if dry_run:
        lineage = _dry_run(recipe, args, rows, model, init_from, revision, console)
        return StageResult("dry run", output_dir, lineage, [])
    if model is None or processor is None:
        raise ValueError(
            "Nothing to start from: give `init_from` (a folder or repository), or `model` and `processor`."
        )
    if rows is None:
        raise ValueError("No data: give `data`, the folder that `agevlm data scenes` has written, or rows.")

    lineage = _lineage(recipe, args, rows, model, init_from, revision)
    earlier = _earlier_lineage(output_dir, lineage["recipe"])
    if earlier is not None and earlier["status"] == "finished":
        console.print(f"{recipe.name}: {output_dir} is finished (recipe {lineage['recipe_hash']}), nothing to do.")
        publish_stage(output_dir, args, init_from, console)
        return StageResult("already finished", output_dir, earlier, _log_history(output_dir))
    # All processes have looked at the folder before one of them changes it.
    args.distributed_state.wait_for_everyone()
    checkpoint = newest_checkpoint(output_dir) if resume and earlier is not None else None
    if args.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        write_lineage(output_dir, lineage)
    if checkpoint is not None:
        console.print(f"{recipe.name}: goes on from {checkpoint.name}.")
    warn_early(args, console)

    set_trainable(model, recipe.trains, recipe.frozen)
    trainer = AgeVlmSFTTrainer(
        model=model,
        args=args,
        lineage=lineage,
        data_collator=AgeVlmDataCollator(
            processor, max_length=args.max_length, pad_to_multiple_of=args.pad_to_multiple_of
        ),
        train_dataset=rows,
        eval_dataset=eval_data,
        processing_class=processor,
        callbacks=list(callbacks),
    )
    if callbacks and args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        lineage = trainer.lineage = {
            **lineage,
            "status": "finished",
            "metrics": _last_metrics(trainer.state.log_history),
        }
        _save_finished(trainer, output_dir)
    finally:
        trainer.release_model()
    publish_stage(output_dir, args, init_from, console)
    return StageResult("trained", output_dir, lineage, list(trainer.state.log_history))


def _load_data(recipe: StageRecipe, args: AgeVlmSFTConfig, data: str | Path | Dataset | None) -> Dataset | None:
    if data is None or isinstance(data, Dataset):
        return data
    if isinstance(data, IterableDataset):
        raise ValueError("An `IterableDataset` cannot go on where it stopped. Give a folder of Parquet shards.")
    data = prepare(data, recipe.data)
    by_length = args.train_sampling_strategy == BY_LENGTH
    shards = load_shards(str(data), recipe.data, recipe.mask_fraction, lengths=by_length)
    return load_rows(data, recipe.data, mask_fraction=recipe.mask_fraction) if shards is None else shards


def _lineage(
    recipe: StageRecipe,
    args: AgeVlmSFTConfig,
    rows: Dataset,
    model: PreTrainedModel,
    init_from: str | Path | None,
    revision: str | None,
) -> dict[str, Any]:
    """Everything that is known about a run when it starts."""
    data = data_fingerprint(rows)
    identity = as_json(
        {
            "stage": recipe.stage,
            "variant": recipe.variant,
            "trains": recipe.trains,
            "frozen": recipe.frozen,
            "training": training_identity(args),
            "data": data,
            "parent_weights": weights_fingerprint(model),
        }
    )
    return {
        "name": recipe.name,
        "stage": recipe.stage,
        "variant": recipe.variant,
        "size": recipe.size,
        "status": "unfinished",
        "repo": args.hub_model_id,
        **parent_lineage(init_from, revision or "main"),
        "recipe_hash": identity_hash(identity),
        "recipe": identity,
        "data": {"part": recipe.data, "mask_fraction": recipe.mask_fraction, **data},
        "git_commit": git_commit(),
        "versions": library_versions(),
        "metrics": {},
    }


def _earlier_lineage(output_dir: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The lineage of an earlier run of the same recipe in `output_dir`, None if nothing is there.

    Raises:
        ValueError: the folder belongs to another recipe, or to something else altogether.
    """
    lineage = read_lineage(output_dir)
    if lineage is None:
        foreign = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else []
        if "config.json" in foreign or any(name.startswith("checkpoint-") for name in foreign):
            raise ValueError(f"{output_dir} holds a model of another origin. Choose an empty folder as output.")
        return None
    changed = changed_fields(lineage["recipe"], identity)
    if changed:
        raise ValueError(
            f"{output_dir} belongs to another recipe ({lineage['name']}, {lineage['variant']}, {lineage['status']}). "
            f"Choose another folder, delete it, or undo the changes: {'; '.join(changed)}."
        )
    return lineage


def _save_finished(trainer: AgeVlmSFTTrainer, output_dir: Path) -> None:
    """Save model, processor, card, log and lineage into `output_dir`; the lineage comes last and says `finished`."""
    staged = staging_folder(output_dir) / "final"
    trainer.save_model(str(staged), _internal_call=True)
    if trainer.args.should_save:
        if trainer.state.best_model_checkpoint:
            trainer.state.best_model_checkpoint = Path(trainer.state.best_model_checkpoint).name
        trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        write_card(staged)
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
    return {name: value for name, value in metrics.items() if not any(part in name for part in noise)}


def _log_history(output_dir: Path) -> list[dict[str, float]]:
    return TrainerState.load_from_json(str(output_dir / TRAINER_STATE_NAME)).log_history


def _source(name: str, value: Any) -> str:
    """Where the paper states a setting, and what it says if that is something else."""
    source = SOURCES.get(name, "")
    paper = {"global_batch_size": 128, **PAPER_TRAINING}.get(name, value)
    return source if paper == value else f"{paper} ({source})"


def _dry_run(
    recipe: StageRecipe,
    args: AgeVlmSFTConfig,
    rows: Dataset | None,
    model: PreTrainedModel | None,
    init_from: str | Path | None,
    revision: str | None,
    console: Console,
) -> dict[str, Any]:
    """Print what a run would do and return it."""
    num_rows = recipe.paper_rows if rows is None else len(rows)
    guided = round(num_rows * recipe.mask_fraction) if rows is None else data_fingerprint(rows)["guided_rows"]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(num_rows / batch) * args.num_train_epochs)
    counts = {
        "rows": num_rows,
        "rows with a mask": guided,
        "rows per step": f"{batch} = {args.per_device_train_batch_size} x {args.world_size} device(s) x "
        f"{args.gradient_accumulation_steps} accumulated",
        "steps": steps,
        "warmup steps": args.get_warmup_steps(steps),
    }
    resolved = {
        "trains": ", ".join(recipe.trains) + (f" without {', '.join(recipe.frozen)}" if recipe.frozen else ""),
        "data": recipe.data,
        "mask_fraction": recipe.mask_fraction,
        "init_from": None if init_from is None else str(init_from),
        "revision": revision,
        "output_dir": args.output_dir,
        **training_identity(args),
        "per_device_train_batch_size": args.per_device_train_batch_size,
    }
    console.print(
        f"[bold]{recipe.name}[/bold] (stage {recipe.stage}, {recipe.variant}, size {recipe.size}): {recipe.goal}"
    )
    table = Table("setting", "value", "paper", title="Resolved configuration")
    for name, value in resolved.items():
        if value is not None:
            table.add_row(name, str(value), _source(name, value))
    console.print(table)
    if model is None and (init_from is not None or recipe.size == "paper"):
        # Counting needs the shapes only.
        config = (
            AgeVlmConfig.paper() if init_from is None else AutoConfig.from_pretrained(init_from, revision=revision)
        )
        with torch.device("meta"):
            model = AgeVlmForConditionalGeneration(config)
    if model is not None:
        set_trainable(model, recipe.trains, recipe.frozen)
        console.print(format_table(trainable_table(model)))
    table = Table("count", "value", title="Counts" if rows is not None else "Counts (the paper's data)")
    for name, value in counts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    return as_json({"recipe": dataclasses.asdict(recipe), "resolved": resolved, "counts": counts})
