"""Where cross-attention looks, at almost no cost (paper section 3.2.2, the A_q and M' of Eq. 3).

Eq. 3 needs the softmax weights averaged over heads and query tokens. Keeping all weights (eager attention) costs
several times the memory and time of a fused kernel. Two exact ways around that:

- `tap`: the map itself. It stands in front of any attention kernel and hands queries and keys on unchanged. The map is
  computed for the selected rows and tokens alone, piece by piece, and nothing of size heads x queries x keys is kept:
  the backward pass computes the weights again and adds its share to the gradients that the kernel returns.
- `attend_with_mass`: only how much of the attention falls into a mask, <M', A_q>. Attention returns a weighted mean
  of the values, so a mask that rides along as one more value channel comes out as that mass. It costs one wider
  attention call, however many tokens are selected: the choice when most of them are.

A row has P phrases, each with tokens and a map (and a mask) of its own; rows with fewer select no token in the others.

Shapes: B batch, P phrases, T text tokens, N images per row, L visual tokens per image, V = N * L, H query heads, G
key/value heads, D head width, Q selected tokens of a row, those of one phrase after those of another.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


# Each copy of this file (the package's, a checkpoint's) has operators of its own. The module's name holds that of the
# checkpoint's folder, which may be any text; a namespace of operators must be an identifier.
_NAMESPACE = "agevlm_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]
_QUERIES_AT_ONCE = 128
_CHANNELS = 8  # fused kernels want head widths that are multiples of 8


@dataclass
class Visibility:
    """Which visual tokens each text token may look at.

    Attributes:
        image_BTN: bool; token t sees image n.
        cells_BNL: bool; the cell shows picture, not padding.
    """

    image_BTN: torch.Tensor
    cells_BNL: torch.Tensor

    def to(self, device: torch.device | str | int) -> "Visibility":
        """On another device: accelerate's hooks call it for blocks that `device_map` has put there."""
        return Visibility(self.image_BTN.to(device), self.cells_BNL.to(device))

    @property
    def text_BT(self) -> torch.Tensor:
        """bool `(B, T)`: the token sees any image."""
        return self.image_BTN.any(-1)


def _pieces(
    query_BHTD: torch.Tensor,
    key_BGVD: torch.Tensor,
    selected_BPT: torch.Tensor,
    image_BTN: torch.Tensor,
    cells_BNL: torch.Tensor,
    scaling: float,
) -> Iterator[
    tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[list[int], torch.Tensor, int]]]
]:
    """The selected part of the attention, a row and up to 128 tokens at a time: row, tokens `(Q,)`, queries
    `(G, H / G * Q, D)`, keys `(G, V, D)`, softmax weights `(G, H / G, Q, V)`, and for each phrase among the tokens its
    number, its part of the weights (a view) and the number of all its tokens. Phrases with the same tokens are
    computed once: one entry with all of their numbers. All in float32: rounding scores of about 10 to bfloat16 would
    change the weights by some percent."""
    groups, width = key_BGVD.shape[1], query_BHTD.shape[-1]
    for row, of_row in enumerate(selected_BPT.cpu().numpy()):
        numbers_of: dict[tuple[int, ...], list[int]] = {}  # by the tokens
        for number, of_phrase in enumerate(of_row):
            numbers_of.setdefault(tuple(of_phrase.nonzero()[0].tolist()), []).append(number)
        tokens = torch.tensor(list(chain(*numbers_of)), device=key_BGVD.device)
        if len(tokens) == 0:
            continue
        key = key_BGVD[row].float()
        for first in range(0, len(tokens), _QUERIES_AT_ONCE):
            tokens_Q = tokens[first : first + _QUERIES_AT_ONCE]
            query = query_BHTD[row][:, tokens_Q].reshape(groups, -1, width).float()
            visible_QV = (image_BTN[row, tokens_Q][..., None] & cells_BNL[row]).flatten(1)
            scores = (query @ key.transpose(1, 2)).mul_(scaling).unflatten(1, (-1, len(tokens_Q)))
            scores.masked_fill_(~visible_QV, float("-inf"))
            weights, phrases, end = scores.softmax(-1), [], -first
            for of_phrase, numbers in numbers_of.items():
                start, end = max(end, 0), end + len(of_phrase)
                if start < min(end, len(tokens_Q)):
                    phrases.append((numbers, weights[:, :, start:end], len(of_phrase)))
            yield row, tokens_Q, query, key, weights, phrases


@torch.library.custom_op(f"{_NAMESPACE}::attention_map", mutates_args=())
def _attention_map(
    query_BHTD: torch.Tensor,
    key_BGVD: torch.Tensor,
    selected_BPT: torch.Tensor,
    image_BTN: torch.Tensor,
    cells_BNL: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    heads = query_BHTD.shape[1]
    maps_BPV = query_BHTD.new_zeros(*selected_BPT.shape[:2], key_BGVD.shape[2], dtype=torch.float32)
    with torch.autocast(query_BHTD.device.type, enabled=False):  # it would undo the casts to float32
        for row, *_, phrases in _pieces(query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL, scaling):
            for numbers, weights, count in phrases:
                maps_BPV[row, numbers] += weights.sum((0, 1, 2)) / (heads * count)
    return maps_BPV


@_attention_map.register_fake
def _(query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL, scaling):
    return query_BHTD.new_empty(*selected_BPT.shape[:2], key_BGVD.shape[2], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::add_map_gradients", mutates_args=("grad_query_BHTD", "grad_key_BGVD"))
def _add_map_gradients(
    grad_query_BHTD: torch.Tensor,
    grad_key_BGVD: torch.Tensor,
    grad_map_BPV: torch.Tensor,
    query_BHTD: torch.Tensor,
    key_BGVD: torch.Tensor,
    selected_BPT: torch.Tensor,
    image_BTN: torch.Tensor,
    cells_BNL: torch.Tensor,
    scaling: float,
) -> None:
    """With W the weights and g the map's gradient, that of the scores is W * (g - <W, g>) / (heads * tokens)."""
    heads, width = query_BHTD.shape[1], query_BHTD.shape[-1]
    with torch.autocast(query_BHTD.device.type, enabled=False):
        for row, tokens_Q, query, key, weights, phrases in _pieces(
            query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL, scaling
        ):
            for numbers, part, count in phrases:
                grad_V = grad_map_BPV[row, numbers].sum(0)
                part.mul_(grad_V - (part @ grad_V)[..., None]).mul_(scaling / (heads * count))
            grad_scores = weights.flatten(1, 2)
            grad_query = (grad_scores @ key).reshape(heads, len(tokens_Q), width)
            grad_query_BHTD[row].index_add_(1, tokens_Q, grad_query.to(grad_query_BHTD.dtype))
            grad_key_BGVD[row] += grad_scores.transpose(1, 2) @ query


@_add_map_gradients.register_fake
def _(grad_query_BHTD, grad_key_BGVD, grad_map_BPV, query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL, scaling):
    return None


def _writable(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A gradient that can be added to in place: what autograd hands on may be nothing, or one number expanded."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.contiguous() if 0 in gradient.stride() else gradient


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL, scaling):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL)
        ctx.scaling = scaling
        maps_BPV = _attention_map(query_BHTD, key_BGVD, selected_BPT, image_BTN, cells_BNL, scaling)
        return query_BHTD.view_as(query_BHTD), key_BGVD.view_as(key_BGVD), maps_BPV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query_BHTD, grad_key_BGVD, grad_map_BPV):
        if grad_map_BPV is not None:
            query_BHTD, key_BGVD, *masks = ctx.saved_tensors  # once: checkpointing unpacks them but once
            grad_query_BHTD = _writable(grad_query_BHTD, query_BHTD)
            grad_key_BGVD = _writable(grad_key_BGVD, key_BGVD)
            _add_map_gradients(grad_query_BHTD, grad_key_BGVD, grad_map_BPV, query_BHTD, key_BGVD, *masks, ctx.scaling)
        return grad_query_BHTD, grad_key_BGVD, None, None, None, None


def tap(
    query_BHTD: torch.Tensor,
    key_BGVD: torch.Tensor,
    query_mask_BPT: torch.Tensor,
    visibility: Visibility,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax weights averaged over heads and selected query tokens (section 3.2.2, the A_q of Eq. 3).

    Args:
        query_BHTD, key_BGVD: queries and keys as the attention uses them, in any floating dtype.
        query_mask_BPT: bool, the selected tokens. Tokens that see no image are left out.

    Returns:
        Queries and keys to be used by the attention (the same numbers), and the maps, float32 `(B, P, V)`: each
        phrase with a selected token sums to 1; others are 0.
    """
    selected_BPT = query_mask_BPT & visibility.text_BT[:, None]
    return _Tap.apply(query_BHTD, key_BGVD, selected_BPT, visibility.image_BTN, visibility.cells_BNL, scaling)


def attend_with_mass(
    attention: Callable,
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BGVD: torch.Tensor,
    value_BGVD: torch.Tensor,
    attention_mask: Any,
    query_mask_BPT: torch.Tensor,
    mask_BPV: torch.Tensor,
    visibility: Visibility,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One call of `attention` (transformers' interface) that also tells how much falls into a mask.

    Args:
        query_mask_BPT: bool, the selected tokens. Tokens that see no image are left out.
        mask_BPV: bool or {0, 1}, the masks of Eq. 3 on the visual tokens. Up to 8 cost as much as one.

    Returns:
        What `attention` returns without the masks, and the mass, float32 `(B, P)`: the mean over heads and selected
        tokens of the weights inside the mask; 0 for phrases without a selected token.
    """
    width, phrases = value_BGVD.shape[-1], mask_BPV.shape[1]
    added = -(-phrases // _CHANNELS) * _CHANNELS
    masks_BGVP = mask_BPV.mT[:, None].expand(-1, value_BGVD.shape[1], -1, -1).to(value_BGVD.dtype)
    attended_BTHD, weights = attention(
        module,
        nn.functional.pad(query_BHTD, (0, added)),
        nn.functional.pad(key_BGVD, (0, added)),
        nn.functional.pad(torch.cat([value_BGVD, masks_BGVP], dim=-1), (0, added - phrases)),
        attention_mask,
        **kwargs,
    )
    # One split: two slices would each send back a gradient of the whole size.
    attended_BTHD, inside_BTHP, _ = attended_BTHD.split([width, phrases, added - phrases], dim=-1)
    selected_BPT = query_mask_BPT & visibility.text_BT[:, None]
    mass_BPT = inside_BTHP.float().mean(2).mT.masked_fill(~selected_BPT, 0)
    return attended_BTHD, weights, mass_BPT.sum(-1) / selected_BPT.sum(-1).clamp(min=1)
