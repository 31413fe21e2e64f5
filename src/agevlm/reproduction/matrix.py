"""The matrix of experiments: every model as one row, a row as the stage runs that lead to it.

`ROWS` is the recipe file of `agevlm reproduce`; the quickstart trains those of `QUICKSTART`. A row is changed in one
thing at a time. Every row takes equally many steps: those of a stage that is left out go to the stage before it (of
stage 1: to the one after).

Rows that begin with the same runs share them: a run's address is all that decides its result but the seed, from the
start on, and the first row of the matrix that needs an address names its folder.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from agevlm.training import stages
from agevlm.training.parts import COLORS, NAMES
from agevlm.training.stages.recipe import StageRecipe


STAGES = dict(enumerate(stages.STAGES.values(), start=1))
Layers = Literal["default", "first", "last", "every"]
Query = Literal["text", "things", "phrases", "phrase-words", "phrase-masks", "phrase-noise"]
Twin = Literal["no", "equal", "small"]
Position = Literal["after_layer", "after_self_attention"]


@dataclass(frozen=True)
class Size:
    """Training rows of each part, questions of an instruction row (`turns`) and of each benchmark, the size of the
    stages' recipes, how often stage 4 sees each row, the share of rows that ask for presence alone and come first, the
    content of the pictures (None: everything there is; `in_two_styles`: of the cut-outs those that are drawn and
    photographed), their side in pixels, where the cross blocks sit (None: every fourth layer), the splits that
    questions are drawn of, and the pairs of the similarity and pictures of the padding (`oblong`).

    From `scratch`, the language model is drawn at random, with half of the pretrained one's width, and trains in all
    stages, so it learns to look things up here."""

    captions: int
    instructions: int
    turns: int
    questions: int
    max_objects: int
    recipes: str
    repeats: int = 1
    presence_first: float = 0.0
    scratch: bool = False
    min_objects: int = 1
    image_size: int = 224
    names: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None
    in_two_styles: bool = False
    cross_attention_layers: tuple[int, ...] | None = None
    splits: tuple[str, ...] = ("composition",)
    pairs: int = 150
    oblong: int = 80

    def steps(self, recipe: StageRecipe) -> int:
        """Optimizer steps of a stage."""
        rows = getattr(self, recipe.data)
        return round(math.ceil(rows / recipe.global_batch_size) * recipe.training["num_train_epochs"])


_TINY = Size(
    captions=3_200,
    instructions=12_800,
    turns=8,
    questions=600,
    max_objects=3,
    recipes="tiny",
    presence_first=0.75,
    names=NAMES,
    colors=COLORS,
    cross_attention_layers=(1, 4),
)
# From scratch, because a language model that looks things up answers without guidance too. Clutter: four to six small
# things, so that looking at things is not yet looking at the right one. A crowd: six to ten. Few: 5,500 questions.
_CLUTTER = replace(_TINY, min_objects=4, max_objects=6, image_size=320)
_CLUTTER_SCRATCH = replace(_CLUTTER, scratch=True, captions=6_400, presence_first=1.0)
SIZES = {
    "tiny-scratch": replace(_TINY, scratch=True, presence_first=1.0),
    "tiny": _TINY,
    "clutter": _CLUTTER_SCRATCH,
    "clutter-few": replace(_CLUTTER_SCRATCH, instructions=800, repeats=16),
    "clutter-able": _CLUTTER,
    "crowd": replace(_CLUTTER_SCRATCH, min_objects=6, max_objects=10),
    "small": Size(
        captions=3_200,
        instructions=3_200,
        turns=4,
        questions=300,
        min_objects=3,  # a row asks for as many things as it has names, once for yes at least
        max_objects=4,
        recipes="small",
        presence_first=1.0,
        in_two_styles=True,
        splits=("composition", "name", "style"),
        pairs=60,
        oblong=40,
    ),
}


@dataclass(frozen=True)
class Start:
    """What stage 1 starts from.

    Args:
        layers: where the cross blocks sit: as the size has it, its first or last one alone, or after every layer.
        twin: the concatenating twin of that model, of equal size or without layers for the cross blocks.
        position: where a cross block stands (`AgeVlmConfig.cross_attention_position`).
    """

    layers: Layers = "default"
    twin: Twin = "no"
    position: Position = "after_layer"

    @property
    def name(self) -> str:
        """Its folder."""
        twin = {"no": "", "equal": "-twin", "small": "-small-twin"}[self.twin]
        inside = "" if self.position == "after_layer" else "-inside"
        return f"start{twin}{inside}" + ("" if self.layers == "default" else f"-{self.layers}")


@dataclass(frozen=True)
class Row:
    """One model of the matrix.

    Args:
        name, title: for machines and for people; no other row has the same.
        group: what is varied.
        guided: stages with guidance.
        stages: stages that run.
        settings: of the guided stages' recipes (`StageRecipe.override`) where they are not the size's.
        query: whose attention is guided (t_q of Eq. 3): all words of the text, or those from the first to the last
            thing or color that it names; phrase by phrase, the words of each drawn to its own mask; or of that the
            words of each alone, drawn to the mask of the text, or its mask alone, to which all words are drawn, or
            every fifth phrase to a phrase's mask of another picture (`phrase-noise`).
        start: what stage 1 starts from.
    """

    name: str
    title: str
    group: str
    guided: tuple[int, ...] = (3,)
    stages: tuple[int, ...] = (1, 2, 3, 4)
    settings: Mapping[str, Any] = field(default_factory=dict)
    query: Query = "text"
    start: Start = Start()


@dataclass(frozen=True)
class Run:
    """One run of a stage: its folder, its recipe and the run it starts from (None: `start`). `query`: see `Row`."""

    name: str
    recipe: StageRecipe
    parent: str | None
    start: Start
    query: Query


BASELINE, GUIDED, GUIDED_TWICE, TWIN = "ca-baseline", "agevlm", "agevlm-lm", "twin"
PHRASES, PHRASES_TWICE = "phrases", "phrases-lm"
QUICKSTART = (BASELINE, GUIDED, PHRASES_TWICE)
MAIN = "Main"


def _phrases_twice(name: str, title: str, query: Query = "phrases", **settings: Any) -> Row:
    """A change of AGE-VLM-LM phrase by phrase."""
    title = f"AGE-VLM-LM phrase by phrase, {title}"
    return Row(name, title, "Phrase by phrase", guided=(3, 4), query=query, settings=settings)


# The paper's variants, the concatenating twins, and the ablation in order of interest. New rows go to the end.
ROWS = {
    row.name: row
    for row in (
        Row(BASELINE, "CA-baseline", MAIN, guided=()),
        Row(GUIDED, "AGE-VLM", MAIN),
        Row(GUIDED_TWICE, "AGE-VLM-LM", MAIN, guided=(3, 4)),
        Row(TWIN, "Concatenating twin", MAIN, guided=(), start=Start(twin="equal")),
        Row("twin-small", "without added layers", "Twin's size", guided=(), start=Start(twin="small")),
        Row("guided-4", "guided in stage 4 alone", "Guidance", guided=(4,)),
        Row("no-stage-2", "without stage 2", "Stages", stages=(1, 3, 4)),
        Row("no-stage-1", "without stage 1", "Stages", stages=(2, 3, 4)),
        Row("max", "attention divided by its maximum", "Normalization", settings={"guidance_normalization": "max"}),
        Row("layers-first", "the first cross block alone", "Cross layers", start=Start("first")),
        Row("layers-last", "the last cross block alone", "Cross layers", start=Start("last")),
        Row("layers-every", "a cross block after every layer", "Cross layers", start=Start("every")),
        Row("query-things", "guided words: the things named", "Query tokens (t_q)", query="things"),
        Row("masks-10", "masks on 10 % of the rows", "Masks", settings={"mask_fraction": 0.1}),
        Row("masks-1", "masks on 1 % of the rows", "Masks", settings={"mask_fraction": 0.01}),
        Row("no-stage-3", "without stage 3, guided in 4", "Stages", stages=(1, 2, 4), guided=(4,)),
        Row("no-stage-4", "without stage 4", "Stages", stages=(1, 2, 3)),
        Row("bce", "binary cross-entropy in place of dice", "Guidance loss", settings={"guidance_loss": "bce"}),
        Row("kl", "divergence in place of dice", "Guidance loss", settings={"guidance_loss": "kl"}),
        Row(
            "inside",
            "cross blocks between self-attention and MLP",
            "Cross layers",
            start=Start(position="after_self_attention"),
        ),
        Row(PHRASES, "AGE-VLM phrase by phrase", MAIN, query="phrases"),
        Row(PHRASES_TWICE, "AGE-VLM-LM phrase by phrase", MAIN, guided=(3, 4), query="phrases"),
        Row("phrase-words", "phrases' words, one mask", "Phrase by phrase", query="phrase-words"),
        Row("phrase-masks", "phrases' masks, all words", "Phrase by phrase", query="phrase-masks"),
        Row("phrases-4", "phrase by phrase in stage 4 alone", "Phrase by phrase", (4,), query="phrases"),
        _phrases_twice("phrases-lm-masks-10", "masks on 10 % of the rows", mask_fraction=0.1),
        _phrases_twice("phrases-lm-noise", "every fifth mask from another picture", "phrase-noise"),
        _phrases_twice("phrases-lm-bce", "binary cross-entropy in place of dice", guidance_loss="bce"),
        _phrases_twice("phrases-lm-kl", "divergence in place of dice", guidance_loss="kl"),
    )
}
# Folders of runs that many rows share; any other is called after the first row that needs it.
_SHARED = {
    (BASELINE, 1): "stage1",
    (BASELINE, 2): "stage2",
    (BASELINE, 3): "stage3-unguided",
    (GUIDED, 3): "stage3-guided",
}


def choose_rows(names: Iterable[str] | None) -> list[Row]:
    """Rows by name or group (`quickstart`: those of the quickstart), in the matrix's order; all without names.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        return list(ROWS.values())
    wanted = {name.lower().replace("isation", "ization") for name in names}  # its spelling before
    known = {"quickstart", *ROWS, *(row.group.lower() for row in ROWS.values())}
    if unknown := sorted(wanted - known):
        raise ValueError(f"No row or group is called {', '.join(unknown)}. There are {', '.join(sorted(known))}.")
    if "quickstart" in wanted:
        wanted.update(QUICKSTART)
    return [row for row in ROWS.values() if {row.name, row.group.lower()} & wanted]


def chain(row: Row, size: str, seed: int) -> list[Run]:
    """The stage runs that lead to a row, first stage first."""
    runs: list[Run] = []
    for address, recipe, query in _addressed(row, SIZES[size]):
        recipe = recipe.override(seed=seed, disable_tqdm=False)  # the default without warnings is True
        runs.append(Run(_names(SIZES[size])[address], recipe, runs[-1].name if runs else None, row.start, query))
    return runs


@cache
def _names(size: Size) -> dict[str, str]:
    """Address -> folder of all runs of the matrix."""
    names: dict[str, str] = {}
    for row in ROWS.values():
        for address, recipe, _ in _addressed(row, size):
            own = f"stage{recipe.stage}-{row.name}"
            names.setdefault(address, _SHARED.get((row.name, recipe.stage), own))
    return names


def _recipe(stage: int, size: Size, **variant: str) -> StageRecipe:
    """The recipe of a stage. From scratch, the language model trains too, at a rate that would make a pretrained one
    forget. Lookup is found after a number of steps rather than of questions, so the questions come in smaller ones."""
    recipe = STAGES[stage](size=size.recipes, **variant)
    if recipe.data == "instructions" and size.repeats > 1:
        recipe = recipe.override(num_train_epochs=size.repeats)
    if not size.scratch:
        return recipe
    trains = tuple(dict.fromkeys([*recipe.trains, "language_model"]))
    recipe = recipe.override(trains=trains, learning_rate=max(recipe.training["learning_rate"], 2e-3))
    if recipe.data == "instructions":
        recipe = recipe.override(global_batch_size=16, per_device_train_batch_size=16)
    return recipe


def _addressed(row: Row, size: Size) -> list[tuple[str, StageRecipe, Query]]:
    """Address, recipe and query of every stage run of a row."""
    made = []
    identity: list[object] = [dataclasses.asdict(row.start)]
    for stage in row.stages:
        guided = stage in row.guided
        query: Query = row.query if guided else "text"
        recipe = _recipe(stage, size, variant=_variant(stage, row.guided, query))
        inherited = [_recipe(s, size) for s in STAGES if s not in row.stages and _successor(s, row.stages) == stage]
        steps = sum(map(size.steps, [recipe, *inherited])) / size.steps(recipe)
        recipe = recipe.override(num_train_epochs=recipe.training["num_train_epochs"] * steps)
        if guided:
            recipe = recipe.override(**row.settings)
        # The variant's name decides nothing beside the settings that follow from it.
        identity.append([dataclasses.asdict(replace(recipe, variant="", goal="")), query])
        made.append((json.dumps(identity, sort_keys=True), recipe, query))
    return made


def unique(chains: Iterable[Sequence[Run]]) -> list[Run]:
    """All runs of several chains, each once, parents before children."""
    return list({run.name: run for path in chains for run in path}.values())


def cross_layers(layers: Layers, default: Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices in the interleaved stack of `depth` Llama layers and cross blocks.

    Args:
        default: those of the size.
    """
    before = [index - number for number, index in enumerate(default)]  # Llama layers in front of each block
    if layers == "every":
        return tuple(2 * number + 1 for number in range(depth))
    if layers == "default":
        return tuple(default)
    return (before[0 if layers == "first" else -1],)


def _variant(stage: int, guided: Sequence[int], query: Query) -> str:
    """The stage recipes' variant with guidance in this stage or not."""
    by_phrase = query in ("phrases", "phrase-noise")
    if stage == 4 and 4 in guided:
        return "agevlm-phrases-lm" if by_phrase else "agevlm-lm"
    if by_phrase:
        return "agevlm-phrases"
    return "agevlm" if stage < 3 or 3 in guided else "ca-baseline"


def _successor(missing: int, stages: Sequence[int]) -> int:
    """The stage that takes over the steps of one that is left out."""
    return max((stage for stage in stages if stage < missing), default=min(stages))
