"""The dry run of a stage beside the paper: every setting, the trained parts, rows and steps, each with its source.

Nothing is downloaded, loaded or written: parameters are counted on a model without weights.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.models import load_config
from agevlm.store import as_json
from agevlm.training.adapters import AdapterArguments
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.freezing import format_table, set_trainable, trainable_table
from agevlm.training.lineage import data_fingerprint, training_identity
from agevlm.training.stages import STAGES
from agevlm.training.stages.recipe import StageRecipe


NOT_STATED = "not stated in the paper"
SOURCES = {
    "trains": "Table 1",
    "data": "section 4",
    "mask_fraction": "sections 3.2.2 and 4: 77K of 2.5M captions, 150K of 10M instructions",
    "guidance_weight": "Table 1, section 3.2.2",
    "guidance_normalization": "section 3.2.2: normalized to a distribution",
    "global_batch_size": "section 4: 16 on each of 8 GPUs",
    "per_device_train_batch_size": "section 4: 16 per GPU",
    "learning_rate": "appendix B",
    "optim": "appendix B: Adam with weight decay",
    "adam_beta2": "appendix B",
    "weight_decay": "appendix B",
    "warmup_steps": "appendix B",
    "num_train_epochs": "appendix B",
    **dict.fromkeys(
        ("adam_beta1", "adam_epsilon", "lr_scheduler_type", "max_grad_norm", "max_length", "bf16", "seed"), NOT_STATED
    ),
    "rows": "section 4: Cambrian 2.5M and 10M",
    "rows with a mask": "sections 3.2.2 and 4",
    "rows per step": "section 4: 16 on each of 8 GPUs",
    "steps": "appendix B: one epoch",
    "warmup steps": "appendix B: 0.03 of the steps",
}


def print_dry_run(
    recipe: StageRecipe,
    args: AgeVlmSFTConfig,
    rows: Dataset | None,
    model: PreTrainedModel | None,
    init_from: str | Path | None,
    revision: str | None,
    adapters: AdapterArguments,
    console: Console,
) -> dict[str, Any]:
    """Print the plan of a run and return it, JSON-ready: `recipe`, `resolved` and `counts`.

    Without `rows` the counts are those of the paper's data.
    """
    paper = STAGES[recipe.name](variant=recipe.variant)
    papers = {name: getattr(paper, name) for name in ("data", "mask_fraction", "global_batch_size")}
    papers |= {**paper.training, "trains": _trains(paper)}
    resolved = {
        "trains": _trains(recipe),
        "data": recipe.data,
        "mask_fraction": recipe.mask_fraction,
        "init_from": None if init_from is None else str(init_from),
        "revision": revision,
        "output_dir": args.output_dir,
        **training_identity(args),
        "per_device_train_batch_size": args.per_device_train_batch_size,
    }
    console.print(f"{recipe.name} (stage {recipe.stage}, {recipe.variant}, size {recipe.size}): {recipe.goal}")
    table = Table("setting", "value", "paper", title="Resolved configuration")
    for name, value in resolved.items():
        if value is not None:
            table.add_row(name, str(value), _source(name, value, papers))
    console.print(table)

    if model is None and (init_from is not None or recipe.size == "paper"):
        config = AgeVlmConfig.paper() if init_from is None else load_config(init_from, revision or "main", ours=True)
        with torch.device("meta"):
            model = AgeVlmForConditionalGeneration(config)
    if model is not None:
        lora = adapters.lora(model.config, recipe.frozen)
        if lora is None:
            set_trainable(model, recipe.trains, recipe.frozen)
        console.print(format_table(trainable_table(model if lora is None else get_peft_model(model, lora))))

    counts = _counts(recipe, args, rows)
    papers = _counts(paper, args, None)
    table = Table("count", "value", "paper", title="Counts" if rows is not None else "Counts (the paper's data)")
    for name, value in counts.items():
        table.add_row(name, _number(value), _source(name, value, papers))
    console.print(table)
    return as_json({"recipe": dataclasses.asdict(recipe), "resolved": resolved, "counts": counts})


def _counts(recipe: StageRecipe, args: AgeVlmSFTConfig, rows: Dataset | None) -> dict[str, int | str]:
    num_rows = recipe.paper_rows if rows is None else len(rows)
    guided = round(num_rows * recipe.mask_fraction) if rows is None else data_fingerprint(rows)["guided_rows"]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(num_rows / batch) * args.num_train_epochs)
    return {
        "rows": num_rows,
        "rows with a mask": guided,
        "rows per step": f"{batch} = {args.per_device_train_batch_size} x {args.world_size} device(s) x "
        f"{args.gradient_accumulation_steps} accumulated",
        "steps": steps,
        "warmup steps": args.get_warmup_steps(steps),
    }


def _trains(recipe: StageRecipe) -> str:
    return ", ".join(recipe.trains) + (f" without {', '.join(recipe.frozen)}" if recipe.frozen else "")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _source(name: str, value: Any, papers: dict[str, Any]) -> str:
    """The place in the paper that states a value, with the paper's value if it differs."""
    source, paper = SOURCES.get(name, ""), papers.get(name, value)
    return source if paper == value else f"{_number(paper)} ({source})"
