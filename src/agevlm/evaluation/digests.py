"""Digests that tell models and settings apart."""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from agevlm.hub_cards import weights_fingerprint
from agevlm.store import digest


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of up to 64 evenly spaced values of every parameter: tells checkpoints apart in milliseconds."""

    def pieces() -> Iterator[str | bytes]:
        for name, parameter in model.named_parameters():
            values = parameter.detach().reshape(-1)
            yield f"{name} {tuple(parameter.shape)}"
            yield values[:: max(1, values.numel() // 64)].float().cpu().numpy().tobytes()

    return digest(pieces())


def stored_fingerprint(name: str, revision: str = "main", adapter: str | None = None) -> str | None:
    """`weights_fingerprint` of the files that a model was loaded from (with an adapter: of its files); None where they
    are no safetensors."""
    place, revision = (name, revision) if adapter is None else (adapter, "main")
    if not Path(place).is_dir():
        place = snapshot_download(place, revision=revision, allow_patterns="*.safetensors", local_files_only=True)
    return weights_fingerprint(place)
