"""Digests that tell models and settings apart."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from agevlm.hub_cards import weights_fingerprint


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of up to 64 evenly spaced values of every parameter: tells checkpoints apart in milliseconds."""
    result = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // 64)].float().cpu().contiguous()
        result.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return result.hexdigest()


def stored_fingerprint(name: str, revision: str = "main", adapter: str | None = None) -> str | None:
    """`weights_fingerprint` of the files that a model was loaded from (with an adapter: of its files); None where they
    are no safetensors."""
    place, revision = (name, revision) if adapter is None else (adapter, "main")
    if not Path(place).is_dir():
        place = snapshot_download(place, revision=revision, allow_patterns="*.safetensors", local_files_only=True)
    return weights_fingerprint(place)


def digest(content: bytes | str) -> str:
    """A short digest of bytes or text."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=16).hexdigest()
