"""What a checkpoint folder says about itself, as plain data: everything that a card states comes from here.

Read are the files that a run leaves behind: `agevlm_stage.json` (recipe, parent, data, code, metrics),
`trainer_state.json` (the course of the loss), `agevlm_push.json` (where it is on the Hub), `config.json` and
`processor_config.json`, the headers of the weights, and what `agevlm card` has put there: `agevlm_evaluation.json` and
`attention.png`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from agevlm.store import digest, open_weights, read_table


LINEAGE_FILE, PUSH_FILE, STATE_FILE = "agevlm_stage.json", "agevlm_push.json", "trainer_state.json"
EVALUATION_FILE, ATTENTION_FILE, LOSS_FILE = "agevlm_evaluation.json", "attention.png", "loss.png"
PARTS = {
    "vision tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "cross-attention blocks": ("model.language_model.cross_attention_layers.",),
    "language model": ("model.language_model.", "lm_head."),
}


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields of `agevlm_stage.json`, and where the folder has them `push`, `config`, `processor`, `log_history`,
    `evaluation`, `evaluation_fits`, `parameters` (of each part), `code` (files that are run on loading) and `figures`.

    Raises:
        ValueError: a file of them is damaged.
    """
    folder = Path(folder)
    facts = dict(read_table(folder / LINEAGE_FILE))
    push = read_table(folder / PUSH_FILE)
    facts |= {
        "push": push,
        "repo": push.get("repo") or facts.get("repo"),
        "config": read_table(folder / "config.json"),
        "processor": read_table(folder / "processor_config.json"),
        "log_history": read_table(folder / STATE_FILE).get("log_history", []),
        "evaluation": read_table(folder / EVALUATION_FILE),
        "evaluation_fits": evaluation_fits(folder),
        "parameters": count_parameters(folder),
        "code": sorted(path.name for path in folder.glob("*.py")),
        "figures": [name for name in (ATTENTION_FILE, LOSS_FILE) if (folder / name).is_file()],
    }
    return facts


def evaluation_fits(folder: Path, evaluation: Mapping[str, Any] | None = None) -> bool | None:
    """Whether results (by default those in the folder) were measured on the folder's weights.

    None: there are no results, or they do not say on which weights; they do since `metrics.json` has `weights`.
    """
    measured = (read_table(folder / EVALUATION_FILE) if evaluation is None else evaluation).get("weights")
    return None if measured is None else measured == weights_fingerprint(folder)


def weights_fingerprint(folder: str | os.PathLike) -> str | None:
    """A hash of the names, types, shapes and bytes of all tensors in a folder's weights (or adapter); None without.

    It is that of the stored tensors, however they are spread over files and whatever they are loaded as. One tensor at
    a time is read.

    Raises:
        ValueError: a file that is no safetensors, or is cut off.
    """
    import torch

    folder = Path(folder)
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("adapter_model.safetensors"))
    with ExitStack() as stack:
        files = [stack.enter_context(open_weights(path)) for path in paths]
        tensors = {name: file for file in files for name in file.offset_keys()}

        def pieces() -> Iterator[str | Any]:
            for name, file in sorted(tensors.items(), key=lambda item: item[0]):
                stored = file.get_slice(name)
                yield f"{name} {stored.get_dtype()} {stored.get_shape()}"
                yield file.get_tensor(name).flatten().view(torch.uint8).numpy()

        return digest(pieces()) if tensors else None


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters per part, read from the headers of the weights; empty without whole weights (an adapter, a draft).

    Raises:
        ValueError: a file that is no safetensors, or is cut off.
    """
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with open_weights(path) as file:
            for name in file.offset_keys():
                part = next((part for part, starts in PARTS.items() if name.startswith(starts)), "other")
                counts[part] = counts.get(part, 0) + math.prod(file.get_slice(name).get_shape())
    return {part: counts[part] for part in (*PARTS, "other") if part in counts}
