"""The settings of a reproduction, and those that deviate from the paper's."""

from collections.abc import Mapping
from datetime import date
from typing import Any

from agevlm.data.scenes.build import FORMAT
from agevlm.training.lineage import RESULT_FIELDS, git_commit, read_lineage
from agevlm.training.stages.recipe import StageRecipe

from .matrix import GUIDED_TWICE, ROWS, SIZES, STAGES, chain
from .prepare import SPLIT
from .scores import Found


def settings(size: str, found: Found, failed: Mapping[str, str]) -> dict[str, str]:
    """The report's lines about settings."""
    folders = {folder for runs in found.values() for run in runs.values() for _, folder in run.stages}
    commits = {str((read_lineage(folder) or {}).get("git_commit", "unknown"))[:12] for folder in folders}
    counts = SIZES[size]
    told = {
        "size": size,
        "date": date.today().isoformat(),
        "scenes": f"format {FORMAT}, split {SPLIT}, {counts.questions:,} questions of each benchmark",
        "other measurements": f"similarity of {counts.pairs} pairs, padding of {counts.oblong} pictures cut to 16 : 9",
        "report written at commit": str(git_commit())[:12],
        "stages trained at commit": ", ".join(sorted(commits)),
    }
    for run in chain(ROWS[GUIDED_TWICE], size, 0):
        recipe, rows = run.recipe, getattr(counts, run.recipe.data)
        told[recipe.name] = (
            f"{rows:,} {recipe.data}, {counts.steps(recipe)} steps of {recipe.global_batch_size}, "
            f"learning rate {recipe.training['learning_rate']:g}, masks on {100 * recipe.mask_fraction:g} %"
        )
    told["shared work"] = "stages that begin several rows alike ran once"
    return told | {f"failed: {name}": reason for name, reason in failed.items()}


def deviation_lines(size: str) -> list[list[str]]:
    """Every setting of the stages that is not that of the size `paper`, with the stages that it is of."""
    stages: dict[tuple[str, str, str], list[str]] = {}
    for run in chain(ROWS[GUIDED_TWICE], size, 0):
        ours, paper = run.recipe, STAGES[run.recipe.stage](size="paper", variant=run.recipe.variant)
        rows = {"rows": f"{getattr(SIZES[size], ours.data):,}"}, {"rows": f"{paper.paper_rows:,}"}
        here, there = _deciding(ours) | rows[0], _deciding(paper) | rows[1]
        for name in (name for name in here if here[name] != there.get(name)):
            known = "not stated" if name not in there else str(there[name])
            stages.setdefault((name, known, str(here[name])), []).append(str(ours.stage))
    lines = [[name, ", ".join(listed), there, here] for (name, there, here), listed in stages.items()]
    return [["setting", "stages", "paper", "here"], *lines]


def _deciding(recipe: StageRecipe) -> dict[str, Any]:
    """The settings of a recipe that decide the result, without the seed."""
    parts = {"trains": ", ".join(recipe.trains), "frozen": ", ".join(recipe.frozen) or "nothing"}
    own = {"masks on": f"{100 * recipe.mask_fraction:.3g} %", "rows in a step": recipe.global_batch_size}
    training = {name: recipe.training[name] for name in RESULT_FIELDS if name in recipe.training and name != "seed"}
    return {**parts, **own, **training}
