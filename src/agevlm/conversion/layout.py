"""What ConvLLaVA's and MobileVLM's repositories share: LLaVA's layout of names and configuration, made transformers'.

Converting is renaming, with one exception. Their image token is no token: it is taken out of the prompt before the
embedding. Here `<image>` is one, behind the vocabulary, so embedding and head grow to the next multiple of 64. No
picture reads the new embeddings. The head's new rows are the mean of the old ones: by Jensen's inequality they take
at most their share (64 of 32,064) of any prediction, and generation suppresses them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig, LlavaProcessor, PreTrainedConfig, PreTrainedModel

from agevlm.conversion.convert_vision import describe_misfits, some
from agevlm.conversion.sources import Source, Weights


LANGUAGE_MODEL = (
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", "lm_head."),
)
# Buffers that transformers computes itself.
LEFT_OUT = r".*(rotary_emb\.inv_freq|embeddings\.position_ids)$"
GROWN = ("model.language_model.embed_tokens.weight", "lm_head.weight")
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OPTIONAL = (
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta",
    "rope_scaling", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The result of a conversion.

    Attributes:
        model_class, config, processor: of transformers, or remote code of ours.
        num_words: published size of the vocabulary.
        origins: name in the model -> the weights that hold it and its name there.
        made: tensors that are in no checkpoint and that nothing reads.
        left_out: names in the checkpoint that the model has no use for.
        notes: what was decided, for the record; JSON-ready.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    processor: LlavaProcessor
    num_words: int
    origins: dict[str, tuple[Weights, str]]
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def dtype(self, name: str) -> torch.dtype:
        """In which the tensor is published, and written."""
        if name in self.made:
            return self.made[name].dtype
        weights, source = self.origins[name]
        return weights.dtypes[source]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor that the model calls `name`, grown if it is a table of tokens."""
        if name in self.made:
            return self.made[name]
        weights, source = self.origins[name]
        tensor = weights[source]
        missing = self.config.text_config.vocab_size - tensor.shape[0] if name in GROWN else 0
        if missing <= 0:
            return tensor
        mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(missing, -1)])


def read_config(source: Source, **expected: Any) -> dict[str, Any]:
    """A checkpoint's configuration as it stands: of type `llava`, AutoConfig would take it for another architecture.

    Args:
        expected: fields that decide the architecture, with the value that is supported.

    Raises:
        ValueError: there is none, or a field has another value.
    """
    config = source.configuration()
    if not config:
        raise ValueError(f"{source.name} holds no config.json.")
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise ValueError(f"{source.name}: config.json lacks {some(missing)}; it is no checkpoint in LLaVA's layout.")
    for name, value in {**expected, "image_aspect_ratio": "pad", "mm_use_im_start_end": False}.items():
        # Absent, it is what LLaVA's code takes it for, which is what is supported
        found = config.get(name, value if name == "mm_use_im_start_end" else None)
        if found != value:
            raise ValueError(
                f"{source.name}: `{name}` of config.json is {found!r}; converted are checkpoints with {value!r}."
            )
    return config


def text_config(config: Mapping[str, Any], num_tokens: int) -> LlamaConfig:
    """The language model's configuration, its vocabulary grown to a multiple of 64 that holds `num_tokens`.

    Raises:
        ValueError: fields that make up none.
    """
    fields = {name: config[name] for name in (*REQUIRED, *OPTIONAL) if config.get(name) is not None}
    try:
        if num_tokens > fields["vocab_size"]:
            fields["vocab_size"] = -(-num_tokens // 64) * 64
        return LlamaConfig(**{"tie_word_embeddings": False, **fields})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"config.json describes no Llama: {' '.join(str(error).split())}") from error


def generation_config(config: LlamaConfig, processor: LlavaProcessor, num_words: int) -> GenerationConfig:
    """Greedy, as both repositories evaluate, and never `<image>` or another token behind the `num_words` words."""
    tokenizer = processor.tokenizer
    unsaid = {processor.image_token_id, *range(num_words, config.vocab_size)}
    return GenerationConfig(
        do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, suppress_tokens=sorted(unsaid),
    )  # fmt: skip


def find_origins(weights: Weights, renames: tuple[tuple[str, str], ...]) -> dict[str, tuple[Weights, str]]:
    """Name in the model -> where it comes from. Names that no rename explains stay; `check_names` reports them."""
    origins = {}
    for source in weights:
        if re.fullmatch(LEFT_OUT, source):
            continue
        rule = next((rule for rule in renames if re.match(rule[0], source)), None)
        origins[source if rule is None else re.sub(*rule, source, count=1)] = (weights, source)
    return origins


def check_names(target: Target) -> dict[str, torch.Tensor]:
    """The model's tensors on the meta device, in its own order, after a check that each has its origin and shape.

    Raises:
        ValueError: names or shapes that do not make up the model; some are named.
    """
    with torch.device("meta"):
        expected = target.model_class(target.config).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items() if name not in target.made}
    wanted |= {name: (target.num_words, *wanted[name][1:]) for name in GROWN}  # as published, before they grow
    found = {name: (f"{at} of {weights.name}", weights.shapes[at]) for name, (weights, at) in target.origins.items()}
    misfits = describe_misfits(wanted, found)
    if misfits:
        raise ValueError(f"The weights do not fit {target.model_class.__name__}. {misfits}.")
    return expected
