"""What a checkpoint folder says about itself, as plain data: everything that a card states comes from here.

Read are the files that a run leaves behind: `agevlm_stage.json` (recipe, parent, data, code, metrics),
`trainer_state.json` (the course of the loss), `agevlm_push.json` (where it is on the Hub), `config.json` and
`processor_config.json`, the headers of the weights, and what `agevlm card` has put there: `agevlm_evaluation.json` and
`attention.png`.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agevlm.store import digest


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
    facts = dict(_read(folder / LINEAGE_FILE))
    push = _read(folder / PUSH_FILE)
    facts |= {
        "push": push,
        "repo": push.get("repo") or facts.get("repo"),
        "config": _read(folder / "config.json"),
        "processor": _read(folder / "processor_config.json"),
        "log_history": _read(folder / STATE_FILE).get("log_history", []),
        "evaluation": _read(folder / EVALUATION_FILE),
        "evaluation_fits": evaluation_fits(folder),
        "parameters": count_parameters(folder),
        "code": sorted(path.name for path in folder.glob("*.py")),
        "figures": [name for name in (ATTENTION_FILE, LOSS_FILE) if (folder / name).is_file()],
    }
    return facts


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no valid JSON ({error}). Restore it, or delete it and lose what it says."
        ) from error


def evaluation_fits(folder: Path, evaluation: Mapping[str, Any] | None = None) -> bool | None:
    """Whether results (by default those in the folder) were measured on the folder's weights.

    None: there are no results, or they do not say on which weights; they do since `metrics.json` has `weights`.
    """
    measured = (_read(folder / EVALUATION_FILE) if evaluation is None else evaluation).get("weights")
    return None if measured is None else measured == weights_fingerprint(folder)


def weights_fingerprint(folder: str | os.PathLike) -> str | None:
    """A hash of the names, types, shapes and bytes of all tensors in a folder's weights (or adapter); None without.

    It is that of the stored tensors, however they are spread over files and whatever they are loaded as.

    Raises:
        ValueError: a file that is no safetensors.
    """
    tensors: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")) or sorted(
        Path(folder).glob("adapter_model.safetensors")
    ):
        start, header = _header(path)
        tensors |= {name: (path, start, tensor) for name, tensor in header.items()}

    def pieces() -> Iterator[str | bytes]:
        for name, (path, start, tensor) in sorted(tensors.items()):
            yield f"{name} {tensor['dtype']} {tensor['shape']}"
            first, last = tensor["data_offsets"]
            with path.open("rb") as file:
                file.seek(start + first)
                while first < last:
                    read = file.read(min(last - first, 2**24))
                    if not read:
                        raise ValueError(f"{path} is cut off: the tensor {name} is not complete.")
                    yield read
                    first += len(read)

    return digest(pieces()) if tensors else None


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters per part, read from the headers of the weights; empty without whole weights (an adapter, a draft).

    Raises:
        ValueError: a file that is no safetensors.
    """
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        for name, tensor in _header(path)[1].items():
            part = next((part for part, starts in PARTS.items() if name.startswith(starts)), "other")
            counts[part] = counts.get(part, 0) + math.prod(tensor["shape"])
    return {part: counts[part] for part in (*PARTS, "other") if part in counts}


def _header(path: Path) -> tuple[int, Mapping[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header."""
    with path.open("rb") as file:
        size = file.read(8)
        length = struct.unpack("<Q", size)[0] if len(size) == 8 else 0
        if not 0 < length <= 100_000_000:  # the format's own limit
            raise ValueError(f"{path} is no safetensors file.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file.") from error
    header.pop("__metadata__", None)
    return 8 + length, header
