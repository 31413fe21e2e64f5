"""A published ConvNeXt as the `ConvNextModel` that AGE-VLM's tower is made of (section 4). Never shipped.

The same network is published under three sets of names:
- open_clip, in a whole CLIP checkpoint: `visual.trunk.stages.2.blocks.5.conv_dw.weight`;
- timm: `stages.2.blocks.5.conv_dw.weight`;
- transformers (`ConvNextModel`): `encoder.stages.2.layers.5.dwconv.weight`.
The layout is recognized from the names and the sizes are read off the shapes, so no configuration is needed.
Converting is renaming: every tensor stays bit for bit, and every one must find its place. Left out on purpose is what
comes after the stage-4 map: the pooled vector's norm, the heads, CLIP's text tower.

Names say nothing about the activation. It is the exact GELU in all of them unless their configuration says otherwise.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import ConvNextConfig, ConvNextModel


# (pattern, replacement), applied to the start of a name.
TIMM_NAMES = (
    (r"stem\.0\.", "embeddings.patch_embeddings."),
    (r"stem\.1\.", "embeddings.layernorm."),
    (r"stages\.(\d+)\.downsample\.([01])\.", r"encoder.stages.\1.downsampling_layer.\2."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"encoder.stages.\1.layers.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.", r"encoder.stages.\1.layers.\2.pwconv\3."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.gamma$", r"encoder.stages.\1.layers.\2.layer_scale_parameter"),
)
POOLED = "pooled norm and head"
TEXT_TOWER = "text tower"


class Layout(NamedTuple):
    """One set of names.

    Attributes:
        marker: the name of the first convolution, which no other layout has.
        prefix: what stands before all names of the tower.
        renames: (pattern, replacement) behind the prefix.
        left_out: pattern of names that AGE-VLM has no use for -> what they are.
    """

    name: str
    marker: str
    prefix: str
    renames: tuple[tuple[str, str], ...]
    left_out: Mapping[str, str]


LAYOUTS = (
    Layout(
        "open_clip",
        "visual.trunk.stem.0.weight",
        "visual.trunk.",
        TIMM_NAMES,
        {
            r"visual\.(trunk\.)?head\.": POOLED,
            r"(transformer|token_embedding|ln_final|text)\.|(positional_embedding|text_projection|logit_scale)$": (
                TEXT_TOWER
            ),
        },
    ),
    Layout("timm", "stem.0.weight", "", TIMM_NAMES, {r"head\.": POOLED}),
    Layout("transformers", "embeddings.patch_embeddings.weight", "", (), {r"layernorm\.": POOLED}),
)


class Conversion(NamedTuple):
    """How a checkpoint becomes a `ConvNextModel`.

    Attributes:
        layout: name of the recognized layout.
        config: the tower's sizes.
        sources: name in `ConvNextModel` -> name in the checkpoint.
        left_out: what was left out on purpose -> number of tensors.
    """

    layout: str
    config: ConvNextConfig
    sources: dict[str, str]
    left_out: dict[str, int]


def some(names: Sequence[str]) -> str:
    """The first four of many names, for a message."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def find_layout(names: Sequence[str]) -> Layout:
    """The layout that a checkpoint's names are written in.

    Raises:
        ValueError: none of the known ones.
    """
    for layout in LAYOUTS:
        if layout.marker in names:
            return layout
    known = ", ".join(f"{layout.name} (has `{layout.marker}`)" for layout in LAYOUTS)
    raise ValueError(
        f"The weights are in no known layout of a ConvNeXt; they hold {some(sorted(names)) or 'nothing at all'}. "
        f"Known are {known}."
    )


def rename(name: str, layout: Layout) -> str:
    """The name in `ConvNextModel`; a name that the layout does not explain stays as it is."""
    if not name.startswith(layout.prefix):
        return name
    tail = name.removeprefix(layout.prefix)
    for pattern, replacement in layout.renames:
        if re.match(pattern, tail):
            return re.sub(pattern, replacement, tail, count=1)
    return name if layout.renames else tail


def tower_config(shapes: Mapping[str, Sequence[int]], hidden_act: str) -> ConvNextConfig:
    """The sizes of a tower, read off the shapes of its tensors under the names of `ConvNextModel`."""
    blocks = [
        (int(match[1]), int(match[2]), shape[0])
        for name, shape in shapes.items()
        if (match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight", name))
    ]
    stages = range(max((stage for stage, _, _ in blocks), default=-1) + 1)
    return ConvNextConfig(
        num_stages=len(stages),
        depths=[max((block + 1 for at, block, _ in blocks if at == stage), default=0) for stage in stages],
        hidden_sizes=[max((width for at, _, width in blocks if at == stage), default=0) for stage in stages],
        patch_size=shapes["embeddings.patch_embeddings.weight"][-1],
        hidden_act=hidden_act,
        layer_norm_eps=1e-6,  # only of the pooled norm; those of the blocks are 1e-6 in every layout
    )


def expected_shapes(config: ConvNextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tower that AGE-VLM keeps of a `ConvNextModel`."""
    with torch.device("meta"):
        model = ConvNextModel(config)
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("layernorm.")
    }


def plan_conversion(shapes: Mapping[str, Sequence[int]], hidden_act: str = "gelu") -> Conversion:
    """Where every tensor of a checkpoint goes.

    Args:
        shapes: name -> shape of all its tensors.
        hidden_act: the tower's activation, as its configuration states it.

    Raises:
        ValueError: an unknown layout, or names and shapes that do not make up one ConvNeXt; some are named.
    """
    layout = find_layout(list(shapes))
    sources: dict[str, str] = {}
    left_out: dict[str, int] = {}
    for name in shapes:
        what = next((what for pattern, what in layout.left_out.items() if re.match(pattern, name)), None)
        if what is None:
            sources[rename(name, layout)] = name
        else:
            left_out[what] = left_out.get(what, 0) + 1
    config = tower_config({target: shapes[source] for target, source in sources.items()}, hidden_act)
    if not config.depths or 0 in config.depths:
        raise ValueError(
            f"The weights look like {layout.name}'s, but hold {config.depths or 'no'} blocks per stage: "
            f"{some(sorted(shapes))}. Is a file of a sharded checkpoint missing?"
        )
    found = {target: (source, tuple(shapes[source])) for target, source in sources.items()}
    misfits = describe_misfits(expected_shapes(config), found)
    if misfits:
        raise ValueError(f"The weights look like {layout.name}'s, but are not a plain ConvNeXt. {misfits}.")
    return Conversion(layout.name, config, sources, left_out)


def describe_misfits(expected: Mapping[str, Sequence[int]], found: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """Names that are missing, unexpected or of another shape, some of each; empty if everything fits.

    Args:
        expected: name in the model -> shape.
        found: name in the model -> name and shape in the checkpoint.
    """
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [source for name, (source, _) in found.items() if name not in expected],
        "of another shape": [
            f"{source} {list(shape)} instead of {list(expected[name])}"
            for name, (source, shape) in found.items()
            if name in expected and tuple(shape) != tuple(expected[name])
        ],
    }
    return "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)


def load_tower(conversion: Conversion, weights: Mapping[str, torch.Tensor]) -> ConvNextModel:
    """The tower in float32, its pooled norm (which AGE-VLM leaves out) untrained. Nothing else is read."""
    model = ConvNextModel(conversion.config).to(torch.float32)
    read = {target: weights[source] for target, source in conversion.sources.items()}
    model.load_state_dict({**{f"layernorm.{k}": v for k, v in model.layernorm.state_dict().items()}, **read})
    return model.eval()
