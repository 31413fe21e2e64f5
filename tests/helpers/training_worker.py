"""Rows, arguments and runs that the training tests share."""

import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset, Features, List, Value
from transformers import TrainerCallback

from agevlm.data.rows import GUIDANCE, MASK_FEATURES, ROW_FEATURES, phrases_of
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.freezing import set_trainable
from agevlm.training.run_stage import StageResult, run_stage
from agevlm.training.stages import stage1_align, stage3_ground
from agevlm.training.stages.recipe import StageRecipe
from agevlm.training.trainer import AgeVlmSFTTrainer
from builders import mask, row, tiny_model, tiny_processor


# Guided rows (g), pictures without a mask (i), text alone (t), unevenly spread over batches and processes.
KINDS = "tgittiig"
PHRASES = "t3itg8i1"  # the same with lists of so many phrases
# For two processes, which take turns. First: text alone in the last batch of both, where gradients are exchanged, and
# one guided row each. Second: one process has all pictures and masks, the other one text alone.
TWO_PROCESS_KINDS = ("8gitiitt", "3t8titit")


@functools.cache
def make_rows(kinds: str = KINDS) -> Dataset:
    """A row per letter of `kinds`; answers and masks differ in size."""
    rows = []
    for index, kind in enumerate(kinds):
        item = row(f"row-{index}", images=0 if kind == "t" else 1, guided=kind not in "ti", seed=index)
        item["messages"][1]["content"] = " ".join(["Yes"] * (1 + index % 4))
        if item["guidance"] is not None:
            right = 30 + 10 * index
            item["guidance"]["mask"] = mask(box=(0, 0, right, 40))
            if kind.isdigit():  # words and masks overlap; the seventh phrase repeats the first, the eighth its words
                query = item["guidance"]["query"]
                item["guidance"] = [
                    {**item["guidance"], "query": query[3 * (n % 6) :], "mask": mask(box=(0, top, right, top + 40))}
                    for n, top in zip(range(int(kind)), (0, 8, 16, 24, 32, 40, 0, 56), strict=False)
                ]
        rows.append(item)
    phrase = {**GUIDANCE, "occurrence": Value("int32")}
    listed = any(map(str.isdigit, kinds))
    for item in rows if listed else []:
        item["guidance"] = phrases_of(item)
    return Dataset.from_list(
        rows, features=Features({**ROW_FEATURES, "guidance": List(phrase) if listed else GUIDANCE})
    )


def make_arguments(output_dir: str | os.PathLike, config=AgeVlmSFTConfig, **overrides):
    """Training arguments of a quiet run of a few steps on the CPU."""
    defaults = {
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "assistant_only_loss": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return config(output_dir=str(output_dir), **{**defaults, **overrides})


def sharp_model(seed: int = 0):
    """A tiny model whose attention is far from uniform: gradients of uniform attention are the same for any loss."""
    model = tiny_model(seed)
    with torch.no_grad():
        for block in model.model.language_model.cross_attention_layers:
            block.cross_attn.q_proj.weight.mul_(15)
            block.cross_attn.k_proj.weight.mul_(15)
    return model


def make_trainer(
    output_dir, kinds=KINDS, parts=("projector", "cross_attention"), model=None, callbacks=(), **overrides
):
    """A trainer for `sharp_model()` on `make_rows(kinds)`."""
    model = sharp_model() if model is None else model
    set_trainable(model, parts)
    processor = tiny_processor()
    args = make_arguments(output_dir, **overrides)
    return AgeVlmSFTTrainer(
        model=model,
        args=args,
        data_collator=AgeVlmDataCollator(processor, max_length=args.max_length),
        train_dataset=make_rows(kinds),
        eval_dataset=make_rows(kinds),
        processing_class=processor,
        callbacks=list(callbacks),
    )


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, before anything changes them."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step_gradients(output_dir, batch_size, accumulation=1, **overrides) -> dict[str, torch.Tensor]:
    """The gradients of one optimizer step. A row that could not be used or guided would be an error."""
    keep = KeepGradients()
    trainer = make_trainer(
        output_dir,
        callbacks=[keep],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0,
        strict=True,
        **overrides,
    )
    trainer.train()
    return keep.gradients


class CountSteps(TrainerCallback):
    """Counts the optimizer steps that a process really makes."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


class Stop(BaseException):
    """Ends a run as a kill would, as far as its folder goes."""


class StopAt(TrainerCallback):
    """Raises `Stop` behind a step, or kills the process there, with no chance to clean up."""

    def __init__(self, step: int, killed: bool = False):
        self.step, self.killed = step, killed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stop


# The paper's recipes, which train parts of the tower, as small models can be compared
IN_FLOAT32 = {"bf16": False, "activation_checkpointing": False, "dataloader_num_workers": 0}


def quick(recipe: StageRecipe, rows: int = 2, **changes) -> StageRecipe:
    """The recipe with `rows` in a step, all at once, and no progress bar."""
    settings = {"per_device_train_batch_size": rows, "disable_tqdm": True, **changes}
    return recipe.override(global_batch_size=rows, **settings)


def run_small_stage(output_dir: str | os.PathLike, callbacks=(), resume=True, **changes) -> StageResult:
    """Stage 3 on a tiny model: 6 steps, a checkpoint every 2."""
    return run_stage(
        quick(stage3_ground.recipe(size="tiny"), **{"save_steps": 2, "logging_steps": 1, **changes}),
        output_dir,
        data=make_rows("gigtgiiggitg"),
        model=tiny_model(),
        processor=tiny_processor(),
        callbacks=callbacks,
        resume=resume,
    )


def run_frozen_stage(output_dir: Path, computes: bool, callbacks=()) -> StageResult:
    """Stage 1 of 6 steps, a checkpoint every 2, on features stored beside the folder or computed."""
    recipe = stage1_align.recipe(size="tiny").override(
        global_batch_size=4, per_device_train_batch_size=2, save_steps=2, num_train_epochs=2, disable_tqdm=True
    )
    return run_stage(
        recipe,
        output_dir,
        data=make_rows("gigtgiiggitg"),
        model=tiny_model(),
        processor=tiny_processor(),
        stored_features=None if computes else output_dir.parent / "store",
        callbacks=callbacks,
    )


def write_shards(folder: Path, kinds: str, shards: int = 3, group_rows: int = 3) -> None:
    """`make_rows(kinds)` in shards, with their masks apart, as `agevlm.training.streaming` reads them."""
    rows = make_rows(kinds).with_format("arrow")[:]
    features = Features({**ROW_FEATURES, "guidance": GUIDANCE})
    (folder / "captions").mkdir(parents=True)
    (folder / "masks").mkdir()
    for shard in range(shards):
        start, stop = (len(rows) * place // shards for place in (shard, shard + 1))
        part = Dataset(rows.slice(start, stop - start)).cast(features).remove_columns("guidance")
        part.to_parquet(folder / f"captions/train-{shard:05}-of-{shards:05}.parquet", batch_size=group_rows)
    masks = [{"id": row["id"], **row["guidance"]} for row in rows.to_pylist() if row["guidance"] is not None]
    Dataset.from_list(masks, features=MASK_FEATURES).to_parquet(folder / "masks/captions.parquet")


@dataclass
class StreamedRun:
    """What `run_streamed_stage` returns: the stage's result and the ids of the rows its steps saw, in order."""

    result: StageResult
    rows: list[str]


class KeepRows(AgeVlmDataCollator):
    """Hands the rows' ids on with each batch, from workers too."""

    def __call__(self, rows):
        ids = torch.tensor([int(row["id"].removeprefix("row-")) for row in rows])
        return {**super().__call__(rows), "row_numbers": ids}


def run_streamed_stage(output_dir: Path, data: Path, callbacks=(), workers: int = 0) -> StreamedRun:
    """Stage 3 on the shards in `data`: 2 rows a step, 2 epochs, a checkpoint every 3 steps."""
    seen: list[str] = []

    class Trainer(AgeVlmSFTTrainer):
        def __init__(self, **kwargs):
            collator = KeepRows(kwargs["processing_class"], max_length=kwargs["args"].max_length)
            super().__init__(**kwargs, data_collator=collator)

        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.extend(f"row-{number}" for number in inputs.pop("row_numbers").tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    recipe = quick(
        stage3_ground.recipe(size="tiny"), num_train_epochs=2, save_steps=3, logging_steps=1,
        dataloader_num_workers=workers, spread_guided_rows=True,
    )  # fmt: skip
    with patch("agevlm.training.run_stage.AgeVlmSFTTrainer", Trainer):
        result = run_stage(
            recipe, output_dir, data=data, model=tiny_model(), processor=tiny_processor(), callbacks=callbacks
        )
    return StreamedRun(result, seen)
