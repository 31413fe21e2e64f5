"""Loads what is evaluated: checkpoints of ours, or any `AutoModelForImageTextToText` of the Hub or a folder with its
own processor and chat template; in 4 bits and with a PEFT adapter on request.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from agevlm.hub_cards import weights_fingerprint
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor

from .processes import current_device


def model_type(name: str, revision: str = "main") -> str | None:
    """What a checkpoint says it is; None where it does not say.

    Raises:
        ValueError: there is no checkpoint of that name.
    """
    try:
        return AgeVlmConfig.get_config_dict(name, revision=revision)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"{name} is no checkpoint: {error}; give its folder or Hub id") from error


def check_checkpoint(name: str, revision: str = "main") -> None:
    """transformers only warns of another model's checkpoint, and goes on with weights drawn at random.

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    found = model_type(name, revision)
    if found != AgeVlmConfig.model_type:
        raise ValueError(
            f"{name} is no AGE-VLM checkpoint: its model type is {found!r}, not {AgeVlmConfig.model_type!r}"
        )


def load_checkpoint(name: str) -> tuple[AgeVlmForConditionalGeneration, AgeVlmProcessor]:
    """Model and processor of ours; see `load_model`.

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    check_checkpoint(name)
    return load_model(name)


def load_model(
    name: str,
    *,
    revision: str = "main",
    adapter: str | None = None,
    four_bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model (in its stored dtype, on this process's accelerator if there is one) and processor.

    Args:
        name: folder or Hub id. Checkpoints of ours run the installed code, never the one beside the weights.
        adapter: folder or Hub id of a PEFT adapter, laid over the model.
        four_bit: NF4 weights, computed in bfloat16 (bitsandbytes).
        trust_remote_code: run the code of a checkpoint that is not ours.

    Raises:
        ValueError: no such checkpoint, not an image-text-to-text model, no chat template, or a missing library.
    """
    if four_bit and find_spec("bitsandbytes") is None:
        raise ValueError("4-bit loading needs bitsandbytes, which is not installed: pip install bitsandbytes")
    found = model_type(name, revision)
    if found is None:
        raise ValueError(f"{name} is no checkpoint: its model type is None; give a folder or Hub id")
    ours = found == AgeVlmConfig.model_type
    remote: dict[str, Any] = {"revision": revision} if ours else {
        "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    settings: dict[str, Any] = {"dtype": "auto", "device_map": current_device()}
    if four_bit:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model_class, processor_class = (
        (AgeVlmForConditionalGeneration, AgeVlmProcessor) if ours else (AutoModelForImageTextToText, AutoProcessor)
    )
    if not ours:
        _check_kind(name, remote)
    try:
        model = model_class.from_pretrained(name, **remote, **settings)
        processor = processor_class.from_pretrained(name, **remote)
    except OSError as error:
        raise ValueError(f"{name} cannot be loaded: {error}; give its folder or Hub id") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{name}: its processor has no chat template, which says how to ask it; add one and save it")
    if adapter is not None:
        model.load_adapter(adapter)
    return model.eval(), processor


def stored_fingerprint(name: str, revision: str = "main", adapter: str | None = None) -> str | None:
    """`weights_fingerprint` of the files that `load_model` has read (with an adapter: of its files); None where they
    are no safetensors."""
    place, revision = (name, revision) if adapter is None else (adapter, "main")
    if not Path(place).is_dir():
        place = snapshot_download(place, revision=revision, allow_patterns="*.safetensors", local_files_only=True)
    return weights_fingerprint(place)


def _check_kind(name: str, remote: dict[str, Any]) -> None:
    try:
        config = AutoConfig.from_pretrained(name, **remote)
    except OSError as error:
        raise ValueError(f"{name} is no checkpoint: {error}; give its folder or Hub id") from error
    known = type(config) in AutoModelForImageTextToText._model_mapping
    if not known and "AutoModelForImageTextToText" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(f"{name} is no image-text-to-text model: its model type is {config.model_type!r}")
