"""The inputs of a reproduction: scenes, guided words, pretrained parts, and the model that stage 1 starts from."""

import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import LlamaConfig

from agevlm import TINY_PARTS
from agevlm.conversion.assemble import spread_cross_attention_layers
from agevlm.conversion.twin import concatenating_twin
from agevlm.data.masks import masks_of
from agevlm.data.rows import MAX_PHRASES, content_digest
from agevlm.data.scenes.benchmarks import FEATURES, GROUP, benchmark_rows
from agevlm.data.scenes.build import build_scenes, load_rows
from agevlm.data.scenes.builder import SceneArguments, SceneBuilder, make_source
from agevlm.data.scenes.words import plural
from agevlm.evaluation import own, pope, told
from agevlm.evaluation.benchmark import Benchmark
from agevlm.evaluation.inputs import PICTURES
from agevlm.evaluation.own_rows import load_own
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import load_scenes, rows_digest
from agevlm.hub_cards.facts import weights_fingerprint
from agevlm.language import read_held_text
from agevlm.models import load_processor
from agevlm.store import claim, new_folder, replacing
from agevlm.training.init import build, plan_parts
from agevlm.training.parts import make_small

from .matrix import Query, Run, Size, Start, cross_layers


SPLIT = "composition"
EVALUATION, LANGUAGE, OWN = "evaluation", "language", "own"  # sets of questions that a row's model answers
# Set -> split of the scenes, and what is asked about it; a size draws all splits or the first alone.
QUESTIONS: dict[str, tuple[str, tuple[Benchmark, ...]]] = {
    EVALUATION: (SPLIT, tuple(protocols["paper"] for protocols in BENCHMARKS.values())),
    LANGUAGE: (SPLIT, (told.PAPER,)),
    "name": ("name", (pope.PAPER,)),
    "style": ("style", (pope.PAPER,)),
}
CURVE_QUESTIONS, CURVE_SEED = 500, 2000  # the seed of scenes is 0, that of parts 1000


def _pictures(size: Size, cutouts: Path | None) -> dict[str, Any]:
    """The content of the pictures of a size, as arguments of `SceneArguments`."""
    names = size.names
    if size.in_two_styles:
        names = tuple(name for name, kind in make_source(cutouts, None, None).kinds.items() if len(kind.styles) > 1)
    return {
        "size": size.image_size,
        "min_objects": size.min_objects,
        "max_objects": size.max_objects,
        "names": names,
        "colors": size.colors,
        "cutouts": cutouts,
    }


def draw_scenes(folder: Path, size: Size, cutouts: Path | None) -> Path:
    """The data set of a size; at once where it is there."""
    return build_scenes(
        folder,
        captions=size.captions,
        instructions=size.instructions,
        turns=size.turns,
        presence_first=size.presence_first,
        test=size.questions,
        splits=size.splits,
        num_proc=min(2, os.cpu_count() or 1),
        **_pictures(size, cutouts),
    )


def draw_questions(path: Path, size: Size, cutouts: Path | None) -> None:
    """The questions of the learning curves, like those that are reported but about other pictures; at once where they
    are there."""
    if path.is_file():
        return
    builder = SceneBuilder(SceneArguments(seed=CURVE_SEED, **_pictures(size, cutouts)))
    name = pope.PAPER.name
    pairs = (benchmark_rows(builder, SPLIT, name, index) for index in range(CURVE_QUESTIONS // GROUP[name]))
    rows = Dataset.from_list([row for pair in pairs for row in pair], features=FEATURES[name])
    with replacing(path) as temporary:
        rows.to_parquet(temporary)


def claim_inputs(output: Path, inputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Every row of a folder has the same inputs: the first call records each, a later one finds the same.

    Raises:
        ValueError: another input.
    """
    for name, stated in inputs.items():
        claim(output / f"{name}.json", stated, f"reproduction with other {name}")


def state_questions(place: Path) -> dict[str, Any]:
    """What own questions are, JSON-ready. Raises ValueError for a file that cannot be asked."""
    rows = load_own(place)
    return {"rows": rows_digest(rows), "pictures": content_digest(rows, PICTURES)}


def state_text(place: Path | None) -> dict[str, Any]:
    """The text whose perplexity is measured (None: scenes in words), JSON-ready. Raises ValueError without a text."""
    return {"text": "scenes"} if place is None else read_held_text(place, load_processor(TINY_PARTS, ours=True)).stated


def state_parts(parts: Path) -> dict[str, Any]:
    """The weights of pretrained parts, JSON-ready."""
    return {name: weights_fingerprint(parts / name) for name in ("language_model", "vision_tower")}


def question_sets(
    scenes: Path, questions: Path | None = None
) -> Iterator[tuple[str, dict[str, str], list[Benchmark], dict[str, Dataset]]]:
    """Name, source, benchmarks and rows of every set of questions that rows are measured on.

    Args:
        questions: own ones (`agevlm eval --data`).
    """
    for name, (split, benchmarks) in QUESTIONS.items():
        if (scenes / "benchmarks" / split).is_dir():
            rows = load_scenes(scenes, split, benchmarks)
            yield name, {"data": "scenes", "split": split}, list(benchmarks), rows
    if questions is not None:
        yield OWN, {"data": questions.name, "split": "test"}, [own.PAPER], {own.PAPER.name: load_own(questions)}


def prepare_parts(size: str, parts: Path | None, output: Path, cutouts: Path | None) -> Path:
    """The folder of the pretrained parts: given, committed (tiny), or made now (small).

    Raises:
        ValueError: parts of the size small have to be made and there are no cut-outs.
    """
    if parts is not None:
        return parts
    if size != "small":
        return TINY_PARTS
    folder = output / "parts"
    if not folder.exists():
        if cutouts is None:
            raise ValueError("The parts of the size `small` are made of cut-outs: give --cutouts or --parts")
        make_small(folder, output / "parts-work", cutouts, scenes=40_000, seed=1000)
    return folder


def half_as_wide(config: LlamaConfig) -> LlamaConfig:
    """The configuration with half of every width: a model from scratch then learns in minutes."""
    widths = {name: getattr(config, name) // 2 for name in ("hidden_size", "intermediate_size", "head_dim")}
    return LlamaConfig(**config.to_dict() | widths | {"initializer_range": widths["hidden_size"] ** -0.5})


def save_start(parts: Path, folder: Path, seed: int, size: Size, start: Start) -> None:
    """The model that stage 1 starts from: the pretrained parts, and projector and cross blocks drawn from `seed`."""
    if (folder / "config.json").exists():
        return
    plan = plan_parts(
        Namespace(
            parts=parts,
            image_size=size.image_size,
            cross_attention_layers=None,
            cross_attention_position=start.position,
        )
    )
    depth = plan.language_config.num_hidden_layers
    default = size.cross_attention_layers or spread_cross_attention_layers(depth)
    plan = replace(plan, cross_attention_layers=cross_layers(start.layers, default, depth))
    if size.scratch:
        plan = replace(plan, language_config=half_as_wide(plan.language_config))
    model: Any = build(plan, seed, from_scratch=size.scratch)
    processor: Any = plan.processor
    if start.twin != "no":
        model, processor = concatenating_twin(model, processor, equal_size=start.twin == "equal")
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def rows_of(scenes: Path, run: Run) -> Dataset:
    """The training rows of a run, with the query its recipe asks for."""
    part, query = run.recipe.data, run.query
    masks = None if query in ("text", "phrases") else _changed(scenes, part, query)
    return load_rows(scenes, part, run.recipe.mask_fraction, masks, by_phrase=query == "phrases")


def _changed(scenes: Path, part: str, query: Query) -> Dataset:
    """The masks of a part in which one thing is another, as `query` says (`matrix.Row`)."""
    masks: Any = masks_of(scenes, part)
    if query == "things":
        words, features = vocabulary(scenes), masks.features
        named = [things_named(text, words) for text in masks["query"]]
        masks = masks.remove_columns("query").add_column("query", named)
        return masks.select_columns(list(features)).cast(features)
    phrases: Any = masks_of(scenes, part, by_phrase=True)
    own = phrases.with_format("arrow")[:]
    if query == "phrase-noise":
        other = np.arange(len(own))
        other[::5] = np.roll(other[::5], math.ceil(MAX_PHRASES / 5))  # further on than a row has phrases
        return Dataset(own.set_column(own.column_names.index("mask"), "mask", own["mask"].take(pa.array(other))))
    text = masks.with_format("arrow")[:]
    text = text.take(pc.index_in(own["id"], value_set=text["id"]))
    text = text.append_column("occurrence", pa.nulls(len(text), pa.int32()))
    taken = ("mask",) if query == "phrase-words" else ("query", "message_index", "occurrence")
    table = pa.table({name: (text if name in taken else own)[name] for name in own.column_names})
    return Dataset(table.cast(phrases.features.arrow_schema))


def vocabulary(scenes: Path) -> list[str]:
    """The things, in both numbers, and colors that a folder of scenes shows."""
    shown = json.loads((scenes / "scenes.json").read_text(encoding="utf-8"))
    return [*shown["names"], *map(plural, shown["names"]), *shown["colours"]]


def things_named(text: str, words: Sequence[str]) -> str:
    """The part of `text` from the first to the last of `words` in it; all of it where there is none."""
    listed = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    found = list(re.finditer(rf"\b(?:{listed})\b", text, flags=re.IGNORECASE))
    return text[found[0].start() : found[-1].end()] if found else text
