"""Stage 4 with adapters (LoRA, QLoRA) in place of the language model's own weights, for a small GPU; not in the paper.

The flags are TRL's (`--use_peft --lora_r 16 ...`, `--load_in_4bit`). Here:
- Adapters on every linear layer of Llama's own layers; projector and cross blocks, which the paper's method lives in,
  train whole (`modules_to_save`); tower, embeddings and norms stay as they are.
- Checkpoints hold the adapters and the parts that train whole. The finished folder is a complete model like any other
  stage's, the adapters merged into the weights in full precision: with `--load_in_4bit` into those of `init_from`,
  which were quantized for training only.
"""

import importlib.util
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import ModelConfig, get_peft_config, get_quantization_config

from agevlm import models
from agevlm.processing import AgeVlmProcessor
from agevlm.training.config import AgeVlmSFTConfig


SELF_ATTENTION, FFN = r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up|down)_proj"
FLOAT_PARTS = (r".*\.vision_tower", r".*\.multi_modal_projector", r".*\.cross_attention_layers", "lm_head")


@dataclass
class AdapterArguments(ModelConfig):
    """TRL's flags for adapters, quantization and the attention kernel. The model itself comes from `--init_from`."""

    def check(self, stage: str, trains: Collection[str], init_from: str | Path | None, args: AgeVlmSFTConfig) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ValueError: the message names the flag and what to do.
        """
        bits = "--load_in_4bit" if self.load_in_4bit else "--load_in_8bit" if self.load_in_8bit else None
        if self.model_name_or_path is not None or self.model_revision != "main":
            raise ValueError("Use `--init_from` and `--revision` for `--model_name_or_path` and `--model_revision`.")
        if (self.attn_implementation or "").startswith(("flash", "kernels-community/flash")):
            raise ValueError(
                f"`--attn_implementation {self.attn_implementation}`: flash kernels take no mask, and padded cells of "
                "pictures need one (docs/design.md). Leave it out: SDPA runs its own flash kernel where nothing is "
                "padded."
            )
        if bits and not self.use_peft:
            raise ValueError(f"`{bits}` needs `--use_peft`: quantized weights cannot be trained themselves.")
        if self.use_peft and "language_model" not in trains:
            raise ValueError(
                f"`--use_peft`: {stage} keeps the language model frozen, so there is nothing for adapters. They are "
                "for stage4_instruct."
            )
        if self.use_peft and args.is_sharded:
            raise ValueError(
                "`--use_peft` does not go with FSDP or DeepSpeed: the adapters are merged at the end, which needs "
                "whole weights. Use training/accelerate/one_gpu.yaml or ddp.yaml."
            )
        if bits and init_from is None:
            raise ValueError(f"`{bits}` needs `--init_from`: a model that is loaded already cannot be quantized.")
        if bits and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"`{bits}` needs bitsandbytes: `pip install 'agevlm[qlora]'`.")

    def lora(self, config: Any, frozen: Collection[str] = ()) -> LoraConfig | None:
        """PEFT's configuration for an AGE-VLM of this configuration; None without `--use_peft`."""
        adapter = get_peft_config(self)
        if adapter is not None:
            layers = FFN if "self_attention" in frozen else f"({SELF_ATTENTION}|{FFN})"
            adapter.target_modules = self.lora_target_modules or rf".*\.language_model\.layers\.\d+\.{layers}"
            blocks = (f"cross_attention_layers.{index}" for index in range(len(config.cross_attention_layers)))
            adapter.modules_to_save = self.lora_modules_to_save or ["multi_modal_projector", *blocks]
        return adapter

    def identity(self, adapter: LoraConfig | None) -> dict[str, Any]:
        """The settings that decide the result of a run; empty without adapters."""
        if adapter is None:
            return {}
        names = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora")
        values = {name: getattr(adapter, name) for name in names}
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
        quantized = {"load_in_4bit": self.load_in_4bit, "load_in_8bit": self.load_in_8bit}
        if self.load_in_4bit:
            quantized |= {"quant_type": self.bnb_4bit_quant_type, "nested": self.use_bnb_nested_quant}
        return {"adapters": {**values, **quantized}}

    @property
    def quantized(self) -> bool:
        """Whether the language model is held in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit


def load_start(
    init_from: str | Path, revision: str | None, adapters: AdapterArguments, quantized: bool | None = None
) -> tuple[PreTrainedModel, AgeVlmProcessor]:
    """The model a stage starts from, float32, its language model quantized where the flags say so; and its processor.

    `quantized=False` loads full precision whatever the flags say.

    Raises:
        ValueError: see `agevlm.models.load`.
    """
    quantization = get_quantization_config(adapters) if quantized is not False else None
    if quantization is not None:
        quantization.llm_int8_skip_modules = list(FLOAT_PARTS)
    model, processor = models.load(
        init_from,
        ours=True,
        revision=revision or "main",
        dtype=torch.float32,
        device_map=None,
        attn_implementation=adapters.attn_implementation,
        quantization_config=quantization,
    )
    if is_deepspeed_zero3_enabled():
        model._weight_conversions = None  # renamings that this way of loading notes without using, undone on saving
    return model, processor


def merge(
    model: PeftModel, init_from: str | Path | None, revision: str | None, adapters: AdapterArguments
) -> PreTrainedModel:
    """A model without adapters that computes what `model` computes; from `init_from` if that was quantized."""
    with tempfile.TemporaryDirectory() as folder:
        if adapters.quantized:
            model.save_pretrained(folder)
            assert init_from is not None  # what is quantized was read from somewhere
            whole, _ = load_start(init_from, revision, adapters, quantized=False)
            model = PeftModel.from_pretrained(whole, folder)
        merged = model.merge_and_unload()
    # PEFT unties trained embeddings in the outer configuration alone
    merged.config.text_config.tie_word_embeddings = merged.config.tie_word_embeddings
    return merged
