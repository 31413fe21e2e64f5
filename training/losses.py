"""The guidance loss (paper section 3.2.2, Eq. 3) as pure functions on attention maps.

Shape suffixes:
    K  cross-attention layers
    B  rows of the batch
    V  visual cells, those of all images of a row side by side (images x grid height x grid width)

`maps_KBV` is what the model returns as `cross_attention_maps`: the softmax weights of each cross-attention layer,
averaged over heads and query tokens, zero on cells that no token may see. `mask_BV` is the mask on the same grid, in
{0, 1}.

Readings of the paper:
- "Normalized to obtain an attention distribution" is read literally as `sum`: P adds up to 1. Then Eq. 3 is
  -log(attention inside the mask) + log((|M| + 1) / 2). `max` divides by the largest cell instead, which makes Eq. 3
  the negative log of the usual soft dice, with pressure to cover the whole mask.
- "Applied to all the cross-attention layers" is read as their mean, so that the weight does not depend on their
  number.

Beside dice there are the losses that it is compared with: binary cross-entropy, which the paper calls difficult to
optimize on sparse masks, and the Kullback-Leibler divergence from an even spread over the mask.
"""

from collections.abc import Callable
from typing import Literal

import torch


GuidanceLoss = Literal["dice", "bce", "kl"]
Normalization = Literal["sum", "max"]
NORMALIZATIONS: tuple[Normalization, ...] = ("sum", "max")

# Keeps divisions and the logarithm finite when a row's attention (inside its mask, or at all) is exactly zero. Far
# below any ratio that a float32 softmax produces otherwise, so that it changes neither the loss nor its gradient.
EPSILON = 1e-12


def normalize_maps(maps_KBV: torch.Tensor, normalization: Normalization = "sum") -> torch.Tensor:
    """P of Eq. 3: `maps_KBV` scaled per layer and row so that the cells sum to 1 (`sum`) or peak at 1 (`max`).

    Computed in float32 at least; a row of zeros stays zero.
    """
    maps_KBV = maps_KBV.to(torch.promote_types(maps_KBV.dtype, torch.float32))
    scale = maps_KBV.sum if normalization == "sum" else maps_KBV.amax
    scale_KB1 = scale(dim=-1, keepdim=True)
    return maps_KBV / scale_KB1.clamp(min=EPSILON)


def dice_loss(attention_KBV: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """Eq. 3: -log(2 <M, P> / (sum M + sum P)), (K, B)."""
    overlap_KB = (attention_KBV * mask_BV).sum(dim=-1)
    total_KB = mask_BV.sum(dim=-1) + attention_KBV.sum(dim=-1)
    return -torch.log(2 * overlap_KB / total_KB.clamp(min=EPSILON) + EPSILON)


def bce_loss(attention_KBV: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of P against M, averaged over the cells: (K, B)."""
    # Above the rounding of 1 - P near P = 1, where EPSILON would vanish
    attention_KBV = attention_KBV.clamp(EPSILON, 1 - 1e-6)
    return -torch.where(mask_BV.bool(), attention_KBV.log(), (-attention_KBV).log1p()).mean(dim=-1)


def kl_loss(attention_KBV: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """KL(M / |M| || P), zero where attention is spread evenly over the mask: (K, B)."""
    size_B = mask_BV.sum(dim=-1).clamp(min=1)
    inside_KB = (mask_BV * torch.log(attention_KBV + EPSILON)).sum(dim=-1) / size_B
    return -inside_KB - size_B.log()


LOSSES: dict[GuidanceLoss, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "dice": dice_loss,
    "bce": bce_loss,
    "kl": kl_loss,
}


def check_loss(loss: str, normalization: str) -> None:
    """Raises ValueError where there is no such guidance loss or normalization, or the two do not go together."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"`guidance_normalization` must be one of {', '.join(NORMALIZATIONS)}, got '{normalization}'."
        )
    if loss not in LOSSES:
        raise ValueError(f"`guidance_loss` must be one of {', '.join(LOSSES)}, got '{loss}'.")
    if loss == "kl" and normalization != "sum":
        raise ValueError("`guidance_loss` 'kl' compares distributions: set `guidance_normalization` to 'sum'.")


def guidance_loss(
    maps_KBV: torch.Tensor,
    mask_BV: torch.Tensor,
    normalization: Normalization = "sum",
    loss: GuidanceLoss = "dice",
) -> torch.Tensor:
    """The guidance loss per row, averaged over the layers.

    Args:
        maps_KBV (`torch.Tensor`): floating point, non-negative.
        mask_BV (`torch.Tensor`): bool or {0, 1}.
        normalization (`"sum"` or `"max"`): how P is made of the maps.
        loss (`"dice"`, `"bce"` or `"kl"`): how P is compared with M; the paper's is `dice`.

    Returns:
        `torch.Tensor` of shape (B,), float32 at least and finite. It is meaningful for guided rows only (those with a
        query and a mask): the caller selects them and divides by their global count.

    Raises:
        ValueError: shapes that do not belong together, see also `check_loss`.
    """
    check_loss(loss, normalization)
    _check_shapes(maps_KBV, mask_BV)
    attention_KBV = normalize_maps(maps_KBV, normalization)
    return LOSSES[loss](attention_KBV, mask_BV.to(attention_KBV.dtype)).mean(dim=0)


def guidance_loss_of_mass(mass_KB: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """Eq. 3 per row in the normalization `sum`, where it needs no more of the attention than its mass in the mask:
    -log(2 m / (sum M + 1)), averaged over the layers.

    Args:
        mass_KB (`torch.Tensor`): floating point, in [0, 1]: <M, P> of each layer and row.
        mask_BV (`torch.Tensor`): bool or {0, 1}.

    Returns:
        `torch.Tensor` of shape (B,), as [`guidance_loss`].

    Raises:
        ValueError: shapes that do not belong together.
    """
    if mass_KB.dim() != 2 or mass_KB.shape[0] == 0 or mass_KB.shape[1] != mask_BV.shape[0]:
        raise ValueError(
            "The mass must have the shape (cross-attention layers >= 1, rows) and the mask (rows, visual cells), got "
            f"{tuple(mass_KB.shape)} and {tuple(mask_BV.shape)}."
        )
    mass_KB = mass_KB.to(torch.promote_types(mass_KB.dtype, torch.float32))
    dice_KB = 2 * mass_KB / (mask_BV.to(mass_KB.dtype).sum(dim=-1) + 1)
    return -torch.log(dice_KB + EPSILON).mean(dim=0)


def in_mask_mass(maps_KBV: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """The share of a row's attention that lies inside its mask, averaged over the layers: (B,) in [0, 1]."""
    _check_shapes(maps_KBV, mask_BV)
    attention_KBV = normalize_maps(maps_KBV, "sum")
    return (attention_KBV * mask_BV.to(attention_KBV.dtype)).sum(dim=-1).mean(dim=0)


def pointing_accuracy(maps_KBV: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """The share of layers whose most attended cell lies inside the row's mask: (B,) in [0, 1]."""
    _check_shapes(maps_KBV, mask_BV)
    peak_KB1 = maps_KBV.argmax(dim=-1, keepdim=True)
    mask_KBV = mask_BV.to(torch.promote_types(maps_KBV.dtype, torch.float32)).expand_as(maps_KBV)
    return mask_KBV.gather(-1, peak_KB1).squeeze(-1).mean(dim=0)


def _check_shapes(maps_KBV: torch.Tensor, mask_BV: torch.Tensor) -> None:
    if maps_KBV.dim() != 3 or maps_KBV.shape[0] == 0 or maps_KBV.shape[1:] != mask_BV.shape:
        raise ValueError(
            "The attention maps must have the shape (cross-attention layers >= 1, rows, visual cells) and the mask "
            f"(rows, visual cells), got {tuple(maps_KBV.shape)} and {tuple(mask_BV.shape)}. Masks and images must go "
            "through the same processor."
        )
