"""The abilities of the pretrained parts, measured on unseen pictures, and their card."""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import ConvNextModel, LlamaForCausalLM

from agevlm.data.scenes.builder import SceneArguments, make_source
from agevlm.data.scenes.conversations import tell
from agevlm.data.scenes.layout import sample_scene
from agevlm.data.scenes.questions import Generator, count, depth, presence, relation, what_color
from agevlm.data.scenes.splits import make_pools
from agevlm.models import load_weights
from agevlm.processing import AgeVlmProcessor
from agevlm.store import write_text

from .tower import cell_accuracy


SPLIT, SEED = "composition", 7
KINDS: dict[str, Generator] = {
    "presence": presence,
    "color": what_color,
    "counting": count,
    "relation": relation,
    "depth": depth,
}
ANSWER_TOKENS = 6
TITLES = {
    "told": "the language model, on scenes in words",
    "cells": "one cell of the tower, read by a linear classifier",
}
Figures = Mapping[str, Mapping[str, float]]  # part (of TITLES) -> ability -> share of right answers


@torch.no_grad()
def told_accuracy(
    model: LlamaForCausalLM, processor: AgeVlmProcessor, scenes: SceneArguments, questions: int = 500
) -> dict[str, float]:
    """Share of questions about scenes in words that the language model answers right, by kind (`KINDS`, without colors
    where things have none).

    The scenes hold one to three things, some of them of color and name pairs that no training text had. An answer is
    right if greedy decoding gives it word by word, and nothing else.
    """
    source = make_source(scenes.cutouts, scenes.names, scenes.colors)
    pool, tokenizer = make_pools(source.kinds, source.colors)[SPLIT], processor.tokenizer
    found = {}
    for kind, generate in KINDS.items():
        if kind == "color" and not source.colors:
            continue
        rng = Random(f"{SEED}/{kind}")
        prompts: list[str] = []
        answers: list[str] = []
        while len(prompts) < questions:
            scene = sample_scene(rng, pool, 1, 3, word_rate=0.0)
            question = generate(rng, scene, pool)
            if question is not None:
                turn = [{"role": "user", "content": tell(scene) + question.prompt}]
                prompts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
                answers.append(question.answer)
        right = 0
        for first in range(0, questions, 100):
            asked = tokenizer(
                prompts[first : first + 100], return_tensors="pt", padding=True, add_special_tokens=False
            )
            ids = model.eval().generate(
                **asked, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )
            texts = tokenizer.batch_decode(ids[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(text == answer for text, answer in zip(texts, answers[first : first + 100], strict=True))
        found[kind] = right / questions
    return found


def measure_parts(folder: Path, scenes: SceneArguments, questions: int = 500, pictures: int = 500) -> Figures:
    """What the parts in `folder` can do.

    Args:
        scenes: names and colors that the parts were trained on.
        questions: of each kind, to the language model (`told_accuracy`).
        pictures: for the tower (`cell_accuracy`).
    """
    processor = AgeVlmProcessor.from_pretrained(folder)
    language_model = load_weights(LlamaForCausalLM, folder / "language_model", exact=True)
    tower = load_weights(ConvNextModel, folder / "vision_tower", exact=True)
    cells = cell_accuracy(tower, processor, scenes, pictures)
    return {
        "told": told_accuracy(language_model, processor, scenes, questions),
        "cells": {f"{key} of the thing": share for key, share in cells.items()},
    }


def write_card(folder: Path, size: str, description: str, figures: Figures, made: Mapping[str, Any]) -> None:
    """`README.md` of the parts: what they are, their abilities, the numbers that made them (`made`)."""
    numbers = ", ".join(f"{name} {value}" for name, value in made.items())
    lines = [
        f"# Pretrained parts of the size {size}",
        "",
        f"{description} `agevlm init --parts` joins them; they have never met.",
        "",
        f"Made by `agevlm parts {size} --output OUTPUT` with {numbers}.",
        "",
        "On unseen pictures (`agevlm/training/parts_card.py`), share of right answers:",
    ]
    for part, shares in figures.items():
        lines += ["", f"| {TITLES[part]} | |", "|---|--:|"]
        lines += [f"| {ability} | {share:.1%} |" for ability, share in shares.items()]
    write_text(folder / "README.md", "\n".join(lines) + "\n")
