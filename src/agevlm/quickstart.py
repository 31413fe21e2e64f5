"""`agevlm quickstart`: the whole method on the embedded data, from composing pictures to a report (sections 3 and 4).

    scenes -> pretrained parts -> stages 1 and 2 -> stage 3, guided and unguided -> stage 4 per variant -> evaluation -> report

Every variant sees the same data for the same number of steps. Stages that are the same computation for several variants
(1 and 2 for all; 3 for the two guided ones) are run once and shared. Everything resumes: run the same command again.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import ConvNextModel, LlamaForCausalLM, TrainerCallback, set_seed
from transformers.utils import logging

from agevlm.analysis.attention import write_examples
from agevlm.analysis.report import write_report
from agevlm.data.scenes import build_scenes
from agevlm.evaluation.run import evaluate_scenes
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.modeling_agevlm.assemble import assemble
from agevlm.processing import AgeVlmProcessor
from agevlm.training.stages import stage1_align, stage2_adapt_vision, stage3_ground, stage4_instruct
from agevlm.training.stages.base import StageRecipe, StageResult, run_stage


VARIANTS = ("ca-baseline", "agevlm", "agevlm-lm")


@dataclass(frozen=True)
class Size:
    """How much of everything: rows of each part, benchmark questions, and where the pretrained parts come from."""

    captions: int
    instructions: int
    questions: int


SIZES = {
    "tiny": Size(captions=6_000, instructions=4_000, questions=600),
    "small": Size(captions=20_000, instructions=20_000, questions=1_000),
}


@dataclass(frozen=True)
class Run:
    """One run of a stage: its folder's name, recipe, and the run it starts from (None: the assembled parts)."""

    name: str
    recipe: StageRecipe
    parent: str | None


def plan(size: str, seed: int) -> list[Run]:
    """All stage runs of one seed, parents before children."""

    def run(stage: ModuleType, variant: str, parent: str | None, name: str) -> Run:
        recipe = stage.recipe(size=size, variant=variant).override(seed=seed, disable_tqdm=True)
        return Run(name, recipe, parent)

    return [
        run(stage1_align, "agevlm", None, "stage1"),
        run(stage2_adapt_vision, "agevlm", "stage1", "stage2"),
        run(stage3_ground, "agevlm", "stage2", "stage3-guided"),
        run(stage3_ground, "ca-baseline", "stage2", "stage3-unguided"),
        run(stage4_instruct, "agevlm", "stage3-guided", "stage4-agevlm"),
        run(stage4_instruct, "agevlm-lm", "stage3-guided", "stage4-agevlm-lm"),
        run(stage4_instruct, "ca-baseline", "stage3-unguided", "stage4-ca-baseline"),
    ]
