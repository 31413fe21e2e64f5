"""AGE-VLM (paper section 3.2): ConvNeXt tower, projector, Llama with interleaved, guidable cross-attention blocks.

What runs, from picture to logits:
- Vision: the raw stage-4 map of ConvNeXt, before the final LayerNorm (that norm only ever saw the pooled vector, so
  the tower leaves it out), flattened and projected by Linear-GELU-Linear.
- Text: `AgeVlmTextModel` is `LlamaModel` under its own module names, plus a list of cross blocks. A Llama checkpoint
  loads without renaming; PEFT targets and parallel plans made for Llama apply.
- Cross blocks (Eq. 2): `cross_attention_agevlm.py`.
- Guidance (section 3.2.2): with `guidance_query_mask` the model also returns `cross_attention_maps`, the softmax
  weights averaged over heads and the selected query tokens, or with `guidance_mask` as well their sum inside that
  mask. The main path stays on the chosen attention kernel (`guidance_agevlm.py`).

Shapes: B batch, T text tokens, N images per row, L visual tokens per image, V = N * L, C vision width, D text width,
H query heads, G key/value heads, K cross blocks.
"""

from dataclasses import dataclass
from typing import Any, Unpack

from .compatibility_agevlm import CACHE, accepts_past_key_values


# isort: split
import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.convnext.modeling_convnext import ConvNextModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
)
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_agevlm import AgeVlmConfig
from .cross_attention_agevlm import AgeVlmCrossAttention, AgeVlmCrossAttentionLayer, AgeVlmDecoderLayer, has_pictures
from .guidance_agevlm import Visibility


@dataclass
class AgeVlmModelOutputWithPast(BaseModelOutputWithPast):
    """Output of [`AgeVlmModel`]. Next to the usual fields:

    cross_attentions (tuple of K tensors `(B, H, T, V)`): weights of each cross block, with `output_attentions=True`
        under eager attention.
    cross_attention_maps (`torch.FloatTensor` `(K, B, P, V)`): float32 mean of the weights over heads and over the
        tokens of each phrase of `guidance_query_mask`; sums to 1 over the visible cells, 0 everywhere without a
        selected token. `(K, B, V)` where that mask has no axis of phrases.
    cross_attention_mass (`torch.FloatTensor` `(K, B, P)` or `(K, B)`): instead of the maps where `guidance_mask` was
        given, their sum inside that mask.
    image_outputs (`BaseModelOutputWithPooling`): what the tower made of the pictures; `pooler_output (B, N, L, D)` are
        the projected visual tokens.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attention_maps: torch.FloatTensor | None = None
    cross_attention_mass: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class AgeVlmCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of [`AgeVlmForConditionalGeneration`]: `loss`, `logits (B, T, vocabulary)` and the fields of
    [`AgeVlmModelOutputWithPast`]."""

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attention_maps: torch.FloatTensor | None = None
    cross_attention_mass: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class AgeVlmPreTrainedModel(PreTrainedModel):
    config: AgeVlmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "AgeVlmDecoderLayer", "AgeVlmCrossAttentionLayer", "ConvNextStage"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    # Flash kernels cannot take the mask that hides the padded cells of a picture.
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers' own, which only warns of the weights that it has to draw at random.

        Raises:
            ValueError: the checkpoint lacks a tensor, or has one too many, of another shape or that is not finite;
                not where `output_loading_info` reports it instead.
        """
        accepted = kwargs.get("ignore_mismatched_sizes", False)
        kwargs.setdefault("ignore_mismatched_sizes", not output_loading_info)  # shapes are checked here
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if output_loading_info:
            return model, report  # for the caller to judge
        if accepted:
            report = {**report, "mismatched_keys": ()}
        if pretrained_model_name_or_path is not None:
            check_weights(model, report, pretrained_model_name_or_path)
        return model


def check_weights(model: nn.Module, report: dict[str, Any], name: Any) -> None:
    """Whether a loaded model is the one that was stored.

    Args:
        report: the `output_loading_info` of `from_pretrained`.
        name: the checkpoint, for the message.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or not finite.
    """
    faults = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in report.get("mismatched_keys", ())),
        "not finite": [
            key
            for key, tensor in {**model.state_dict(), **dict(model.named_buffers())}.items()
            if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and tensor.device.type != "meta"
            and not getattr(tensor, "_local_tensor", tensor).isfinite().all()
        ],
    }
    said = [
        f"{len(keys)} {fault} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})"
        for fault, keys in faults.items()
        if keys
    ]
    if said:
        raise ValueError(
            f"{name}: the weights do not fit the configuration. Tensors: {'; '.join(said)}. Download or save the "
            "checkpoint again, or correct its config.json."
        )


class AgeVlmVisionTower(ConvNextModel):
    """`ConvNextModel` up to its stage-4 map; the final LayerNorm serves only the pooled vector and is left out."""

    _fsdp_plan = {"encoder.stages.*": "free_full_weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        del self.layernorm

    def get_correct_attn_implementation(self, *args, **kwargs) -> str:
        """A ConvNeXt has no attention: whatever is asked of the whole model, nothing changes here."""
        return "eager"

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """`pixel_values (M, 3, height, width)` -> `last_hidden_state (M, L, C)`, cells row by row."""
        outputs = self.encoder(self.embeddings(pixel_values), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state.flatten(2).transpose(1, 2),
            hidden_states=outputs.hidden_states,
        )


class AgeVlmMultiModalProjector(nn.Module):
    """The paper's two linear layers; without an activation between them they would be one."""

    def __init__(self, config: AgeVlmConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_sizes[-1], config.text_config.hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., C)` -> `(..., D)`."""
        return self.linear_2(self.act(self.linear_1(features)))


class AgeVlmTextModel(LlamaModel):
    """`LlamaModel` with cross blocks between its layers. Without pictures it computes what `LlamaModel` computes."""

    _no_split_modules = AgeVlmPreTrainedModel._no_split_modules
    _supports_flash_attn = False
    # Beside Llama's own plans, which the configuration brings
    _tp_plan = {  # noqa: RUF012
        "cross_attention_layers.*.cross_attn.q_proj": "colwise",
        "cross_attention_layers.*.cross_attn.k_proj": "colwise",
        "cross_attention_layers.*.cross_attn.v_proj": "colwise",
        "cross_attention_layers.*.cross_attn.o_proj": "rowwise",
        # Each rank normalizes its own heads with the whole weight.
        "cross_attention_layers.*.cross_attn.q_norm": "replicated_with_grad_allreduce",
        "cross_attention_layers.*.cross_attn.k_norm": "replicated_with_grad_allreduce",
        "cross_attention_layers.*.mlp.gate_proj": "colwise",
        "cross_attention_layers.*.mlp.up_proj": "colwise",
        "cross_attention_layers.*.mlp.down_proj": "rowwise",
    }
    _fsdp_plan = {"cross_attention_layers.*": "free_full_weight"}  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
        "cross_attentions": OutputRecorder(AgeVlmCrossAttention, index=1),
    }

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config.text_config)
        self.cross_attention_layers = nn.ModuleList(
            [AgeVlmCrossAttentionLayer(config, index) for index in range(len(config.cross_attention_layers))]
        )
        self.cross_attention_schedule = config.cross_attention_schedule
        self.blocks_inside = config.cross_attention_position == "after_self_attention"
        for after in self.cross_attention_schedule if self.blocks_inside else ():
            self.layers[after - 1] = AgeVlmDecoderLayer(config.text_config, after - 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Asked of the module that owns the parameter: for code outside of transformers, modules without parameters of
        # their own are not visited.
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        elif isinstance(module, AgeVlmCrossAttentionLayer) and module.attn_gate is not None:
            init.zeros_(module.attn_gate)
            init.zeros_(module.mlp_gate)

    @accepts_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        image_states: torch.FloatTensor | None = None,
        visibility: Visibility | None = None,
        guidance_query_mask: torch.BoolTensor | None = None,
        guidance_mask: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmModelOutputWithPast:
        """As `LlamaModel.forward`, with `image_states (B, V, D)` (None when cached) and `visibility` (None: the batch
        has no pictures and the cross blocks do not run)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        cross_mask = None if visibility is None else self._cross_attention_mask(inputs_embeds, visibility)

        hidden_states = inputs_embeds
        # Positional in every block: as keywords, reentrant checkpointing would go through the tower's graph twice.
        cross_inputs = (image_states, cross_mask, visibility, cache, guidance_query_mask, guidance_mask)
        llama_inputs = {
            "attention_mask": causal_mask,
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            "position_ids": position_ids,
            "use_cache": use_cache,
            CACHE: cache,
            **kwargs,
        }
        guidance: list[torch.Tensor | None] = []
        for index in range(self.config.num_hidden_layers + 1):
            if not self.blocks_inside:
                for cross_layer in self._blocks_behind(index, visibility):
                    hidden_states, measured = cross_layer(hidden_states, *cross_inputs)
                    guidance.append(measured)
            if index == self.config.num_hidden_layers:
                break
            if isinstance(self.layers[index], AgeVlmDecoderLayer):
                blocks = self._blocks_behind(index + 1, visibility)
                hidden_states, *measured = self.layers[index](
                    hidden_states, *cross_inputs, cross_layers=blocks, **llama_inputs
                )
                guidance.extend(measured)
            else:
                hidden_states = self.layers[index](hidden_states, **llama_inputs)
        output = AgeVlmModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})
        if guidance_query_mask is not None and visibility is not None:
            field = "cross_attention_maps" if guidance_mask is None else "cross_attention_mass"
            # Blocks that `device_map` has spread over devices leave theirs on each.
            output[field] = torch.stack([measured.to(hidden_states.device) for measured in guidance])
        return output

    def _blocks_behind(self, num_layers: int, visibility: Visibility | None) -> list[nn.Module]:
        """The cross blocks behind so many Llama layers, or none for a batch without pictures. More than one where the
        configuration puts them side by side."""
        places = [] if visibility is None else range(len(self.cross_attention_schedule))
        return [self.cross_attention_layers[i] for i in places if self.cross_attention_schedule[i] == num_layers]

    def _cross_attention_mask(self, inputs_embeds: torch.Tensor, visibility: Visibility):
        """The mask of the chosen attention kernel, None where nothing has to be hidden.

        With one image per row the cells decide alone: tokens before the image are silenced by the block itself. With
        several, the mask also says which image a token sees. A token that sees none is shown everything, so that no
        softmax runs over an empty set.
        """
        batch, num_images, length = visibility.cells_BNL.shape
        has_image_B = visibility.text_BT.any(-1)
        cells_BV = visibility.cells_BNL.flatten(1) | ~has_image_B[:, None]
        sees_image = None
        if num_images > 1:
            allowed_BTN = visibility.image_BTN | ~visibility.text_BT[..., None]
            # Images that a row does not have hold no picture: they stay hidden from its seeing tokens.
            cells_BV = cells_BV | ~visibility.cells_BNL.any(-1)[..., None].expand(-1, -1, length).flatten(1)

            def sees_image(batch_idx, head_idx, q_idx, kv_idx):
                return allowed_BTN[batch_idx, q_idx, kv_idx // length]

        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            # None instead of all-True, so that a batch without padding runs without a mask
            attention_mask=cells_BV,
            encoder_hidden_states=inputs_embeds.new_empty(batch, cells_BV.shape[1], 0),
            and_mask_function=sees_image,
        )
        if (
            mask is None
            and not torch.compiler.is_compiling()
            and self.config._attn_implementation == "sdpa"
            and inputs_embeds.device.type == "cpu"
            and inputs_embeds.shape[1] == 1
        ):
            # A mask that hides nothing: for a single token transformers then lets the query heads of a group share
            # one read of their keys and values; without one, torch's CPU kernel reads them for each query head.
            mask = cells_BV[:, None, None]
        return mask


class AgeVlmModel(AgeVlmPreTrainedModel):
    """AGE-VLM without a language-model head."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)  # of a checkpoint that has one

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.vision_tower = AgeVlmVisionTower._from_config(config.vision_config)
        self.multi_modal_projector = AgeVlmMultiModalProjector(config)
        self.language_model = AgeVlmTextModel(config)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """Visual tokens of a list of pictures.

        Args:
            pixel_values (`torch.FloatTensor` `(M, 3, height, width)`): cast to the tower's dtype. Row-aligned ones
                `(B, N, 3, height, width)` are taken as B * N pictures.

        Returns:
            `last_hidden_state (M, L, C)` from the tower and `pooler_output (M, L, D)`, projected.
        """
        outputs = self.vision_tower(pixel_values.flatten(0, -4).to(self.vision_tower.dtype), **kwargs)
        outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state)
        return outputs

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        image_mask: torch.BoolTensor | None = None,
        visual_token_mask: torch.BoolTensor | None = None,
        cross_attention_mask: torch.BoolTensor | None = None,
        guidance_query_mask: torch.BoolTensor | None = None,
        guidance_mask: torch.BoolTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmModelOutputWithPast:
        """Runs tower, projector and decoder.

        Args:
            pixel_values (`torch.FloatTensor` `(B, N, 3, height, width)` or `(B, 3, height, width)`): row-aligned
                pictures. New pictures replace those in the cache; leave out to go on with the cached ones.
            image_mask (`torch.BoolTensor` `(B, N)`): which of the N places of a row hold a picture. Default: all.
            visual_token_mask (`torch.BoolTensor` `(B, N, L)`): cells that show picture, not padding. Default: all.
            cross_attention_mask (`torch.BoolTensor` `(B, T, N)`): token t of the whole sequence, cached part included,
                sees image n. Later tokens see what the last one sees. Default, also where it is shorter than the text
                of a first call: a token sees the images whose placeholders do not come after it; without
                `input_ids`, every image of its row.
            guidance_query_mask (`torch.BoolTensor` `(B, P, T)`): tokens of each phrase whose attention maps are
                wanted; aligned with the tokens of this call. `(B, T)`: one phrase, and results without that axis.
            guidance_mask (`torch.BoolTensor` `(B, P, N, L)`): the visual tokens to look at, for each phrase (`(B, V)`
                or `(B, N, L)` for one). With it the attention inside them is returned in place of whole maps.

        Raises:
            ValueError: pictures, masks and placeholders of a row do not fit each other, as after tokens were moved
                and `cross_attention_mask` was not; `guidance_mask` without `guidance_query_mask`, or not one mask for
                each of its phrases.
        """
        if guidance_mask is not None and guidance_query_mask is None:
            raise ValueError("`guidance_mask` says where to look; `guidance_query_mask` must say which tokens should.")
        one_phrase = False
        if guidance_query_mask is not None and guidance_query_mask.dim() == 2:
            one_phrase = True
            guidance_query_mask = guidance_query_mask[:, None]
            guidance_mask = None if guidance_mask is None else guidance_mask[:, None]
        if guidance_mask is not None and guidance_mask.shape[:2] != guidance_query_mask.shape[:2]:
            raise ValueError(
                f"`guidance_query_mask` has the shape {tuple(guidance_query_mask.shape)} (rows, phrases, tokens) and "
                f"`guidance_mask` {tuple(guidance_mask.shape)}. Give each phrase one mask."
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_outputs = image_states = None
        if pixel_values is not None:
            if pixel_values.dim() == 4:
                pixel_values = pixel_values[:, None]
            batch, num_images = pixel_values.shape[:2]
            if batch != inputs_embeds.shape[0]:
                raise ValueError(
                    f"`pixel_values` has {batch} rows and the text {inputs_embeds.shape[0]}: pictures are aligned "
                    "with rows; pad rows with fewer pictures and say so in `image_mask`."
                )
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
            image_outputs.pooler_output = image_outputs.pooler_output.unflatten(0, (batch, num_images))
            image_states = image_outputs.pooler_output.flatten(1, 2).to(inputs_embeds.dtype)

        visibility = self._visibility(
            input_ids,
            inputs_embeds,
            None if image_outputs is None else image_outputs.pooler_output.shape[1:3],
            cache,
            image_mask,
            visual_token_mask,
            None if cross_attention_mask is None else cross_attention_mask.flatten(2),
        )
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_states=image_states,
            visibility=visibility,
            guidance_query_mask=None if guidance_query_mask is None else guidance_query_mask.bool(),
            guidance_mask=None if guidance_mask is None else guidance_mask.flatten(2),
            **kwargs,
        )
        if one_phrase:
            for field in {"cross_attention_maps", "cross_attention_mass"} & outputs.keys():
                outputs[field] = outputs[field].squeeze(2)
        outputs.image_outputs = image_outputs
        return outputs

    def _visibility(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        new_images: tuple[int, int] | None,
        cache: Cache | None,
        image_mask: torch.Tensor | None,
        visual_token_mask: torch.Tensor | None,
        cross_attention_mask: torch.Tensor | None,
    ) -> Visibility | None:
        """Which cells each token of this call may see; None when there is no picture, neither new nor cached.

        Args:
            new_images: (images per row, cells per image) of this call's pictures.
        """
        batch, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        num_text_layers = self.config.text_config.num_hidden_layers
        if new_images is not None:
            num_images, num_visual = new_images[0], new_images[0] * new_images[1]
        elif has_pictures(cache, num_text_layers):
            num_visual = cache.layers[num_text_layers].keys.shape[2]
            given = [
                mask.shape[axis] for mask, axis in ((image_mask, 1), (cross_attention_mask, 2)) if mask is not None
            ]
            num_images = given[0] if given else 1
        else:
            return None

        if image_mask is None:
            image_mask = torch.ones(batch, num_images, dtype=torch.bool, device=device)
        if image_mask.shape != (batch, num_images):
            raise ValueError(
                f"`image_mask` has shape {tuple(image_mask.shape)}; {batch} rows of {num_images} pictures need "
                f"{(batch, num_images)}."
            )
        image_mask = image_mask.bool()
        if visual_token_mask is None:
            visual_token_mask = torch.ones(
                batch, num_images, num_visual // num_images, dtype=torch.bool, device=device
            )
        if visual_token_mask.shape != (batch, num_images, num_visual // num_images):
            raise ValueError(
                f"`visual_token_mask` has shape {tuple(visual_token_mask.shape)}; the pictures have "
                f"{(batch, num_images, num_visual // num_images)} (rows, images, cells)."
            )

        past_length = cache.get_seq_length() if cache is not None else 0
        if cross_attention_mask is not None and (
            cross_attention_mask.shape[0] != batch or cross_attention_mask.shape[2] != num_images
        ):
            raise ValueError(
                f"`cross_attention_mask` has shape {tuple(cross_attention_mask.shape)}; expected ({batch} rows, "
                f"text, {num_images} images)."
            )
        placeholders_BT = None
        if input_ids is not None and new_images is not None:
            placeholders_BT = input_ids == self.config.image_token_id
            number_BT = placeholders_BT.cumsum(-1)
            if past_length == 0 and cross_attention_mask is not None and cross_attention_mask.shape[1] < length:
                # Tokens were appended, and perhaps moved, after the mask was made: the whole text is here and decides.
                cross_attention_mask = None
        # A compiled graph cannot branch on values; in it, the two mistakes go unnoticed.
        checks = not torch.compiler.is_compiling()
        if cross_attention_mask is not None:
            positions = torch.arange(length, device=device) + past_length
            positions = positions.clamp(max=cross_attention_mask.shape[1] - 1)
            image_BTN = cross_attention_mask.bool()[:, positions]
            if checks and placeholders_BT is not None:
                own_BT1 = (number_BT - 1).clamp(0, num_images - 1)[..., None]
                hidden_BT = placeholders_BT & ~image_BTN.gather(-1, own_BT1)[..., 0]
                if hidden_BT.any():
                    row, token = hidden_BT.nonzero()[0].tolist()
                    raise ValueError(
                        f"Row {row}: `cross_attention_mask` hides a picture from its own placeholder, token {token}. "
                        "The tokens were moved and the mask was not; leave the mask out."
                    )
        elif placeholders_BT is not None:
            if checks and not torch.equal(placeholders_BT.sum(-1), image_mask.sum(-1)):
                raise ValueError(
                    f"The rows hold {placeholders_BT.sum(-1).tolist()} image placeholders (token "
                    f"{self.config.image_token_id}) but {image_mask.sum(-1).tolist()} pictures. Put one placeholder "
                    "per picture, mark missing pictures in `image_mask`, and leave out those that the cache holds."
                )
            image_BTN = number_BT[..., None] > torch.arange(num_images, device=device)
        else:
            image_BTN = torch.ones(batch, length, num_images, dtype=torch.bool, device=device)
        return Visibility(image_BTN & image_mask[:, None], visual_token_mask.bool() & image_mask[..., None])


def _kept_states(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states `(B, T, D)` whose logits are wanted: the last ones (0: all), positions for every row `(P,)` or for
    each `(B, P)`, or a boolean mask `(B, T)`. The rules are transformers' `slice_logits_to_keep`, new in 5.21."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]


class AgeVlmForConditionalGeneration(AgeVlmPreTrainedModel, GenerationMixin):
    """AGE-VLM with its language-model head: answers questions about pictures."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config)
        self.model = AgeVlmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # An answer that held a placeholder would speak of a picture that is not there.
        self.generation_config.suppress_tokens = [config.image_token_id]

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """transformers' `generate`.

        Raises:
            ValueError: the text has a placeholder, and there is neither a picture nor a cache that may hold one.
        """
        ids = kwargs.get("input_ids", inputs)
        pictures = ("pixel_values", "inputs_embeds", "past_key_values", CACHE)
        if ids is not None and all(kwargs.get(name) is None for name in pictures):
            rows = (ids == self.config.image_token_id).any(-1).nonzero().flatten().tolist()
            if rows:
                raise ValueError(
                    f"Row {rows[0]} has a placeholder of a picture and there is no `pixel_values`. Pass all that the "
                    "processor returns: `generate(**inputs)`."
                )
        return super().generate(inputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        """Drafting lengthens `cross_attention_mask` as if it were that of Mllama, which has a fourth axis."""
        if model_kwargs.get("cross_attention_mask") is not None:
            model_kwargs["cross_attention_mask"] = model_kwargs["cross_attention_mask"][..., None]
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _update_model_kwargs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        """Later steps find the pictures in the cache. transformers before 5.15 would send them at every step."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("pixel_values", None)
        return model_kwargs

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`AgeVlmModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        image_mask: torch.BoolTensor | None = None,
        visual_token_mask: torch.BoolTensor | None = None,
        cross_attention_mask: torch.BoolTensor | None = None,
        guidance_query_mask: torch.BoolTensor | None = None,
        guidance_mask: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AgeVlmCausalLMOutputWithPast:
        """Logits, and the language-model loss if `labels (B, T)` are given (-100 is ignored).

        The pictures' arguments are those of [`AgeVlmModel.forward`]. The guidance loss is the trainer's: this method
        only returns the maps it needs.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_mask=image_mask,
            visual_token_mask=visual_token_mask,
            cross_attention_mask=cross_attention_mask,
            guidance_query_mask=guidance_query_mask,
            guidance_mask=guidance_mask,
            return_dict=True,
            **kwargs,
        )
        # As a matrix: given a slice in three dimensions, torch may copy the head's weights first, which in bfloat16 on
        # a CPU takes seconds at every prefill of Llama-1B's vocabulary.
        kept = _kept_states(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(kept.flatten(0, -2)).unflatten(0, kept.shape[:-1])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AgeVlmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            cross_attention_maps=outputs.cross_attention_maps,
            cross_attention_mass=outputs.cross_attention_mass,
            image_outputs=outputs.image_outputs,
        )


# Once for each Auto class that users of a checkpoint may call; the last one is what `auto_map` records for the class,
# the others come from the configuration.
AgeVlmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmPreTrainedModel"]
