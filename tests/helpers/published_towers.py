"""ConvNeXts as timm publishes them: names and shapes, proven by `tests/conversion/test_convert_vision.py`."""

from collections.abc import Mapping

import torch


Shapes = dict[str, tuple[int, ...]]


def timm_shapes(depths: list[int], widths: list[int], embedding: int = 768) -> Shapes:
    """What timm's `convnext_*_mlp` of a CLIP holds, written down from its published checkpoints."""
    shapes: Shapes = {
        "stem.0.weight": (widths[0], 3, 4, 4),
        "stem.0.bias": (widths[0],),
        "stem.1.weight": (widths[0],),
        "stem.1.bias": (widths[0],),
    }
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            before = widths[stage - 1]
            shapes |= {f"stages.{stage}.downsample.0.{kind}": (before,) for kind in ("weight", "bias")}
            shapes[f"stages.{stage}.downsample.1.weight"] = (width, before, 2, 2)
            shapes[f"stages.{stage}.downsample.1.bias"] = (width,)
        for block in range(depth):
            at = f"stages.{stage}.blocks.{block}"
            shapes[f"{at}.gamma"] = (width,)
            shapes[f"{at}.conv_dw.weight"] = (width, 1, 7, 7)
            shapes |= {f"{at}.{name}": (width,) for name in ("conv_dw.bias", "norm.weight", "norm.bias")}
            shapes[f"{at}.mlp.fc1.weight"], shapes[f"{at}.mlp.fc1.bias"] = (4 * width, width), (4 * width,)
            shapes[f"{at}.mlp.fc2.weight"], shapes[f"{at}.mlp.fc2.bias"] = (width, 4 * width), (width,)
    last = widths[-1]
    return shapes | {
        "head.norm.weight": (last,),
        "head.norm.bias": (last,),
        "head.pre_logits.fc.weight": (last, last),
        "head.pre_logits.fc.bias": (last,),
        "head.fc.weight": (embedding, last),
        "head.fc.bias": (embedding,),
    }


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under which every tensor shows: LayerScale as published starts at 1e-6 and hides its block."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
