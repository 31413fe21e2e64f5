"""Attention weights of chosen layers and tokens while the model runs as usual, `generate` included.

The chosen layers get a copy of their configuration that names an attention of ours, registered through transformers'
attention interface; every other layer keeps its own. Ours calls the very function that the layer would have called, so
outputs do not change by a bit, and computes the weights of the wanted tokens beside it. (Setting single layers to
`eager` would go wrong: the mask is made once, for the model's own kernel, and eager reads None as "hide nothing".)
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


KERNEL = "sdpa"  # the one whose masks are understood here: None, bool or added
IMPLEMENTATION = "agevlm_recorded"


@dataclass
class Recorder:
    """The attention of one layer, in a batch of one row.

    Attributes:
        tokens: int `(Q,)`, the tokens of the prompt whose weights are wanted.
        weights: float32 `(Q, keys)` of the prompt, then `(1, keys)` per generated token; mean over heads.
    """

    tokens: torch.Tensor
    weights: list[torch.Tensor] = field(default_factory=list)


_recorders: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()


@contextmanager
def recording(layers: Mapping[int, Any], tokens: torch.Tensor) -> Iterator[dict[int, Recorder]]:
    """Records the attention of `layers` (index -> module with `config`) for the prompt's `tokens` and every later one.

    A model records one prompt at a time.

    Raises:
        ValueError: a layer without a configuration, already recording, or with a kernel other than sdpa.
    """
    configs, recorders = {}, {}
    for index, module in layers.items():
        config = getattr(module, "config", None)
        kernel = getattr(config, "_attn_implementation", None)
        if kernel != KERNEL:
            raise ValueError(
                f"layer {index} ({type(module).__name__}) runs on {kernel!r} or is recorded already; load the model "
                f"with `attn_implementation='{KERNEL}'` and record one prompt at a time"
            )
        configs[index], recorders[index] = config, Recorder(tokens)
    try:
        for index, module in layers.items():
            module.config = copy.copy(configs[index])
            # The setter would pass the name on to configurations inside of this one, which other layers share.
            module.config._attn_implementation_internal = IMPLEMENTATION
            _recorders[module] = recorders[index]
        yield recorders
    finally:
        for index, module in layers.items():
            module.config = configs[index]
            _recorders.pop(module, None)


def _recorded(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: `query (B, H, T, D)`, `key` and `value (B, G, keys, D)`."""
    recorder = _recorders[module]
    result = ALL_ATTENTION_FUNCTIONS[KERNEL](module, query, key, value, attention_mask, **kwargs)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or query.shape[0] != 1 or not (attention_mask is None or isinstance(attention_mask, torch.Tensor)):
        raise ValueError(f"attention with {', '.join(unknown) or 'several rows or a block mask'} cannot be recorded")
    if recorder.weights and query.shape[2] != 1:
        raise ValueError(f"{query.shape[2]} tokens in one step; generate greedily, one token at a time")
    tokens = torch.zeros(1, dtype=torch.long) if recorder.weights else recorder.tokens
    recorder.weights.append(_weights(module, query, key, attention_mask, tokens.to(query.device), kwargs))
    return result


def _weights(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tokens: torch.Tensor,
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    """float32 `(Q, keys)`: softmax weights of the chosen tokens, mean over heads."""
    length, keys = query.shape[2], key.shape[2]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = query.shape[1] // key.shape[1]
    chosen = query[0, :, tokens].float()
    scores = chosen @ key[0].float().repeat_interleave(heads, 0).transpose(1, 2) * scaling  # (H, Q, keys)
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        mask = attention_mask[0, ..., :keys]
        mask = mask[:, tokens] if mask.shape[1] == length else mask
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    elif is_causal and length > 1:
        scores = scores.masked_fill(torch.arange(keys, device=key.device) > tokens[:, None], float("-inf"))
    return scores.softmax(-1).mean(0).cpu()


AttentionInterface.register(IMPLEMENTATION, _recorded)
