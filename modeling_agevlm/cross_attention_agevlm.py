"""The cross block of AGE-VLM (paper section 3.2.1, Eq. 2): text attends to the projected picture.

RMSNorm on the query side (Eq. 2 leaves it out; raw residual norms saturate the softmax), grouped-query cross-attention
without rotary positions, residual, RMSNorm + SwiGLU MLP, residual. Output projections start at zero, so that an
untrained model is the Llama. Keys and values of the pictures are projected once and live in cache layers of their own,
behind Llama's in the same cache.

Where this differs from transformers' Mllama: a token that may see no image gets exactly nothing from a cross block
(attention and MLP branch), and `is_causal=False` is said to every kernel.

Shapes: B batch, T text tokens, N images per row, L visual tokens per image, V = N * L, D text width, H query heads,
G key/value heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
)

from .configuration_agevlm import AgeVlmConfig
from .guidance_agevlm import Visibility, attend_with_mass, tap


class AgeVlmCrossCacheLayer(DynamicLayer):
    """The keys and values of a row's pictures in one cross block.

    They are written once and read at every later step, so new ones replace the old ones, and `crop`, which takes back
    text tokens (assisted decoding), leaves them alone.
    """

    # Of fixed size once written. A static cache counts as static only if all of its layers do; otherwise its unused
    # places would not be masked out of self-attention.
    is_compileable = True

    def __init__(self, fetched_next: CacheLayerMixin | None = None):
        super().__init__()
        self.fetched_next = fetched_next

    def prefetch(self) -> None:
        """Pictures stay on their device. A cache that offloads (`cache_implementation="offloaded"`) fetches the layer
        behind the one it is in; behind Llama's last one that must be Llama's first, not this one."""
        if self.fetched_next is not None:
            self.fetched_next.prefetch()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def reset(self) -> None:
        """The next prompt may be text alone. Zeros, which transformers before 5.20 leaves, would count as pictures."""
        self.is_initialized = False

    # Before 5.15, `generate` asks all layers of a static cache whether the next prompt fits. The length is Llama's.
    max_cache_len = 0

    @property
    def max_batch_size(self) -> int:
        return self.keys.shape[0]


def cross_cache_layer(cache: Cache, num_text_layers: int, index: int) -> AgeVlmCrossCacheLayer:
    """The cache layer of cross block `index`, appended behind the text layers on first use."""
    while len(cache.layers) < num_text_layers:  # a `DynamicCache()` made without a config creates its layers lazily
        cache.layers.append(cache.layer_class_to_replicate())
    # Only where it is needed: exporters take apart whatever a layer holds.
    fetched_next = cache.layers[0] if cache.offloading else None
    while len(cache.layers) <= num_text_layers + index:
        cache.layers.append(AgeVlmCrossCacheLayer(fetched_next))
    return cache.layers[num_text_layers + index]


def has_pictures(cache: Cache | None, num_text_layers: int) -> bool:
    """Whether a cache holds pictures; one that was `reset` does not."""
    return cache is not None and len(cache.layers) > num_text_layers and cache.layers[num_text_layers].is_initialized


def zero_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A linear layer whose weights start at zero: the end of a residual branch that is closed at first. Marked, not
    subclassed, because quantizers (bitsandbytes) pass over subclasses of `nn.Linear`."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.starts_at_zero = True
    return linear


class AgeVlmCrossAttention(nn.Module):
    """Grouped-query attention of text over visual tokens, without positions and never causal (Eq. 2)."""

    def __init__(self, config: AgeVlmConfig, cross_index: int):
        super().__init__()
        text_config = config.text_config
        self.config = text_config
        self.cross_index = cross_index
        self.head_dim = text_config.head_dim
        self.num_key_value_groups = text_config.num_attention_heads // text_config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width, bias = text_config.hidden_size, text_config.attention_bias
        self.q_proj = nn.Linear(width, text_config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, text_config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, text_config.num_key_value_heads * self.head_dim, bias=bias)
        output = nn.Linear if config.cross_attention_gate == "tanh" else zero_linear
        self.o_proj = output(text_config.num_attention_heads * self.head_dim, width, bias=bias)
        norm = LlamaRMSNorm if config.cross_attention_qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, text_config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, text_config.rms_norm_eps)

    def project_images(self, image_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`image_states (B, V, D)` -> keys and values `(B, G, V, head width)`, all that is cached of the pictures."""
        visual_shape = (*image_states.shape[:-1], -1, self.head_dim)
        key = self.k_norm(self.k_proj(image_states).view(visual_shape).transpose(1, 2))
        return key, self.v_proj(image_states).view(visual_shape).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        attention_mask: Any,
        visibility: Visibility,
        cache: Cache | None,
        guidance_query_mask: torch.Tensor | None,
        guidance_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`hidden_states (B, T, D)`, `image_states (B, V, D)` or None when the keys are cached. Returns the attended
        states, the weights (eager only) and what guidance asks for: maps `(B, P, V)`, or mass `(B, P)`, or None."""
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads_shape).transpose(1, 2))
        if guidance_query_mask is not None and query.shape[1] != self.config.num_attention_heads:
            raise ValueError(
                f"Guidance averages over all {self.config.num_attention_heads} heads; under tensor parallelism this "
                f"process has {query.shape[1]}. Use `fsdp_size` in place of `tp_size`."
            )
        cached = None
        if cache is not None:
            cached = cross_cache_layer(cache, self.config.num_hidden_layers, self.cross_index)
        if image_states is None:
            key, value = cached.keys, cached.values
        else:
            key, value = self.project_images(image_states)
            if cached is not None:
                key, value = cached.update(key, value)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        kwargs = {
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.scaling,
            "is_causal": False,  # unsaid, SDPA runs causal cross-attention whenever no mask is given
        }
        guidance = None
        if guidance_mask is not None:
            attended, weights, guidance = attend_with_mass(
                attention_interface,
                self,
                query,
                key,
                value,
                attention_mask,
                guidance_query_mask,
                guidance_mask,
                visibility,
                **kwargs,
            )
        else:
            if guidance_query_mask is not None:
                query, key, guidance = tap(query, key, guidance_query_mask, visibility, self.scaling)
            attended, weights = attention_interface(self, query, key, value, attention_mask, **kwargs)
        attended = self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return attended, weights, guidance


class AgeVlmCrossAttentionLayer(GradientCheckpointingLayer):
    """The cross block of Eq. 2. Tokens that see no image pass through it unchanged."""

    def __init__(self, config: AgeVlmConfig, cross_index: int):
        super().__init__()
        text_config = config.text_config
        self.cross_attn = AgeVlmCrossAttention(config, cross_index)
        self.input_layernorm = LlamaRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(text_config.hidden_size, eps=text_config.rms_norm_eps)
        self.mlp = LlamaMLP(text_config)
        if config.cross_attention_gate == "tanh":
            self.attn_gate = nn.Parameter(torch.zeros(1))
            self.mlp_gate = nn.Parameter(torch.zeros(1))
        else:
            self.attn_gate = self.mlp_gate = None
            self.mlp.down_proj = zero_linear(
                text_config.intermediate_size, text_config.hidden_size, bias=text_config.mlp_bias
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        attention_mask: Any,
        visibility: Visibility,
        cache: Cache | None = None,
        guidance_query_mask: torch.Tensor | None = None,
        guidance_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        sees_BT1 = visibility.text_BT[..., None]
        attended, _, guidance = self.cross_attn(
            self.input_layernorm(hidden_states),
            image_states,
            attention_mask,
            visibility,
            cache,
            guidance_query_mask,
            guidance_mask,
        )
        if self.attn_gate is not None:
            attended = attended * self.attn_gate.tanh()
        # `where`, not a product: whatever a kernel returns for a token with nothing to see, it leaves no trace
        hidden_states = torch.where(sees_BT1, hidden_states + attended, hidden_states)
        transformed = self.mlp(self.post_attention_layernorm(hidden_states))
        if self.mlp_gate is not None:
            transformed = transformed * self.mlp_gate.tanh()
        hidden_states = torch.where(sees_BT1, hidden_states + transformed, hidden_states)
        return hidden_states, guidance


class AgeVlmDecoderLayer(LlamaDecoderLayer):
    """A Llama layer with cross blocks between its self-attention and its MLP: where the text of section 3.2.1 puts
    them (`cross_attention_position="after_self_attention"`). The blocks stay in the decoder's own list."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *cross_inputs: Any,
        cross_layers: Sequence[AgeVlmCrossAttentionLayer],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """As a Llama layer, with the inputs of its cross blocks behind `hidden_states`.

        Returns:
            The states, then what guidance asks of each block.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        guidance = []
        for cross_layer in cross_layers:
            hidden_states, measured = cross_layer(hidden_states, *cross_inputs)
            guidance.append(measured)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), *guidance
