"""The paper's figure 3 for any configuration: tower, projector, Llama with its cross blocks, guidance loss, stages.

The same configuration gives the same bytes. Every block is a group of the SVG with an id, `cross-7` for instance.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D

from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.progress import written
from agevlm.store import replacing


# Table 1: the stages in which a part trains or a loss counts. `training/stages/` decides; a test compares.
TRAINS = {
    "tower": (4,),
    "last-stage": (2, 3, 4),
    "projector": (1, 2, 3, 4),
    "cross": (1, 2, 3, 4),
    "llama": (4,),
    "lm-loss": (1, 2, 3, 4),
    "guidance-loss": (3,),
}
STAGES = ("align", "adapt vision", "ground", "instruct")
SIZE = (100.0, 66.0)  # of the drawing; a unit is a tenth of an inch
STACK = (42.0, 13.0, 20.0, 42.0)  # left, bottom, width, height of Llama's layers and the cross blocks
INK, FAINT, PAPER = "#1f2430", "#6b7280", "#ffffff"
VISION, LLAMA, CROSS, GUIDE = "#2b8a7a", "#64748b", "#e07a1f", "#b4236a"
_HEAT = (0.15, 0.35, 0.55, 0.75)  # levels of the attention map


class Block(NamedTuple):
    """A rectangle of the drawing: `kind` is `llama`, `cross` or `mlp`, `position` counts the interleaved stack."""

    kind: str
    position: int
    left: float
    bottom: float
    width: float
    height: float


def stack(config: AgeVlmConfig) -> list[Block]:
    """Llama's layers and the cross blocks, lowest first. A cross block is twice as high as a layer; one that stands
    inside a layer has the layer's self-attention (`llama`) below and its MLP (`mlp`) above it."""
    parts: list[tuple[str, int, float]] = []
    for position in range(config.text_config.num_hidden_layers + len(config.cross_attention_layers)):
        if position not in config.cross_attention_layers:
            parts.append(("llama", position, 1.0))
        elif config.cross_attention_position == "after_layer":
            parts.append(("cross", position, 2.0))
        else:
            if parts[-1][0] == "llama":
                parts[-1:] = [(kind, parts[-1][1], 0.5) for kind in ("llama", "mlp")]
            parts.insert(-1, ("cross", position, 2.0))
    left, bottom, width, height = STACK
    unit = height / sum(share for *_, share in parts)
    blocks = []
    for kind, position, share in parts:
        blocks.append(Block(kind, position, left, bottom, width, 0.82 * unit * share))
        bottom += unit * share
    return blocks


def draw(config: AgeVlmConfig, image_size: int = 768) -> Figure:
    """The drawing of a model that reads pictures of `image_size` pixels a side."""
    figure = Figure(figsize=(SIZE[0] / 10, SIZE[1] / 10), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.set_axis_off()
    cells = image_size // 4 // 2 ** (len(config.vision_config.depths) - 1)
    _tower(axes, config, image_size, cells)
    blocks = stack(config)
    _language_model(axes, config, blocks)
    crossed = [block.bottom + block.height / 2 for block in blocks if block.kind == "cross"]
    for end, bus, start, color in ((42, 37.5, (24.5, 58.5), VISION), (66.5, 66.5, (66.5, 48), GUIDE)):
        away = end == bus  # the attention leaves the blocks, keys and values enter them
        for height in crossed:
            _line(axes, color, (62, height), (bus, height)) if away else _arrow(
                axes, color, (bus, height), (end, height)
            )
        heights = (*crossed, start[1])
        _line(axes, color, (bus, min(heights)), (bus, max(heights)))
        _line(axes, color, start, (bus, start[1])) if not away else _arrow(axes, color, start, (70, start[1]))
    _text(axes, 37, 60.1, "keys and values", VISION, ha="right", size=8)
    _guidance(axes, cells)
    _legend(axes, config)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the drawing as SVG: texts are outlines, and nothing depends on the date."""
    with replacing(path) as temporary, rc_context({"svg.hashsalt": "agevlm", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(str(temporary), metadata={"Date": None, "Creator": None})


def run_verb(arguments: Any) -> None:
    """`agevlm analyze architecture`.

    Raises:
        ValueError: the file is to have another format.
    """
    if arguments.output.suffix != ".svg":
        raise ValueError(f"--output {arguments.output}: the drawing is an SVG; give a name that ends in .svg")
    config, image_size = AgeVlmConfig.paper(), 768
    if arguments.model is not None:
        from agevlm.models import load_config, load_processor

        config = load_config(arguments.model, ours=True)
        image_size = load_processor(arguments.model, ours=True).image_processor.size["height"]
    save(draw(config, image_size), arguments.output)
    written(arguments.output)


def _tower(axes: Any, config: AgeVlmConfig, image_size: int, cells: int) -> None:
    _picture(axes, 8, 3, 13)
    _text(axes, 23, 9.5, f"{image_size} x\n{image_size} pixels", FAINT, ha="left", size=8)
    _arrow(axes, VISION, (14.5, 16.4), (14.5, 18.6))
    depths, widths = config.vision_config.depths, config.vision_config.hidden_sizes
    step = 21.5 / len(depths)
    for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        grid, wide = image_size // 4 // 2**number, 23 - 11 * number / max(len(depths) - 1, 1)
        last = number == len(depths) - 1
        bottom = 18.8 + step * number
        _box(axes, f"vision-{number}", 14.5 - wide / 2, bottom, wide, step * 0.84, VISION, strong=last)
        text = f"{depth} block{'s' * (depth > 1)}\n{grid} x {grid} x {width}"
        _text(axes, 14.5, bottom + step * 0.4, text, PAPER if last else INK, size=7.5)
        _strip(axes, "last-stage" if last else "tower", 27, bottom + step * 0.42 - 1)
    _text(axes, 2, 28, "ConvNeXt", VISION, rotation=90, weight="bold", size=9)
    _arrow(axes, VISION, (14.5, 40.0), (14.5, 42.4))
    _grid(axes, 9.5, 42.6, 10, cells, VISION)
    _text(axes, 20.7, 47.6, f"{cells} x {cells} = {cells * cells}\nvisual tokens", FAINT, ha="left", size=8)
    _arrow(axes, VISION, (14.5, 53.0), (14.5, 55.6))
    hidden = config.text_config.hidden_size
    _box(axes, "projector", 4.5, 55.8, 20, 5.4, VISION)
    _text(axes, 14.5, 59.6, "projector", INK, weight="bold", size=9)
    _text(axes, 14.5, 57.3, f"{widths[-1]} → {hidden} → {hidden}", INK, size=7.5)
    _strip(axes, "projector", 4.5, 62)


def _language_model(axes: Any, config: AgeVlmConfig, blocks: Sequence[Block]) -> None:
    left = 40.2
    for word in ("Is", "there", "a", "red", "apple", "?"):
        wide = 1.6 + 0.78 * len(word)
        _box(axes, None, left, 3, wide, 3.2, LLAMA)
        _text(axes, left + wide / 2, 4.6, word, INK, size=8)
        left += wide + 0.5
    _text(axes, 52, 1.4, "text tokens", FAINT, size=8)
    _arrow(axes, LLAMA, (52, 6.6), (52, 8.6))
    _box(axes, "embeddings", 42, 8.8, 20, 2.9, LLAMA)
    _text(axes, 52, 10.2, "embeddings", INK, size=8)
    for block in blocks:
        cross = block.kind == "cross"
        color = CROSS if cross else LLAMA
        _box(axes, f"{block.kind}-{block.position}", *block[2:], color, strong=cross)
        if cross:
            middle, size = block.bottom + block.height / 2, min(8.5, 6.2 * block.height)
            _text(axes, 52, middle, f"cross block {block.position}", PAPER, weight="bold", size=size)
    _box(axes, "head", 42, 55.8, 20, 2.9, LLAMA)
    _text(axes, 52, 57.2, "head", INK, size=8)
    _arrow(axes, LLAMA, (52, 59), (52, 60.8))
    _text(axes, 46, 62.6, "LM loss", INK, weight="bold", size=9.5)
    _strip(axes, "lm-loss", 51.5, 61.6)


def _guidance(axes: Any, cells: int) -> None:
    grid = np.linspace(0, 1, cells, endpoint=False) + 0.5 / cells
    across, up = np.meshgrid(grid, grid)
    away = np.hypot((across - 0.36) / 0.2, (up - 0.42) / 0.22)
    heat = np.exp(-(np.hypot((across - 0.40) / 0.26, (up - 0.46) / 0.28) ** 2))
    for level in _HEAT:
        _cells(axes, heat >= level, 70, 42, 12, GUIDE, 0.25)
    _grid(axes, 70, 42, 12, cells, GUIDE)
    _cells(axes, away <= 1, 86, 42, 12, INK, 0.85)
    _grid(axes, 86, 42, 12, cells, FAINT)
    _text(axes, 76, 40.3, "attention $P$", GUIDE, size=8.5)
    _text(axes, 76, 38.3, "mean over heads and\nthe text's tokens", FAINT, size=7.5, va="top")
    _text(axes, 92, 40.3, "mask $M'$", INK, size=8.5)
    for left in (76, 92):
        _arrow(axes, GUIDE, (left, 54.4), (left, 56.4))
    _box(axes, "guidance-loss", 70, 56.6, 28, 5.6, GUIDE)
    _text(axes, 84, 59.4, r"$-\log\;\frac{2\,\langle M',\,P\rangle}{\Sigma M'+\Sigma P}$", INK, size=12)
    _text(axes, 70.2, 64.2, "guidance loss", GUIDE, weight="bold", size=9.5, ha="left")
    _strip(axes, "guidance-loss", 84.5, 63.2)
    _arrow(axes, INK, (92, 36.4), (92, 39.2))
    _box(axes, "segmenter", 86, 31.8, 12, 4.4, FAINT)
    _text(axes, 92, 34, "Florence-2 + SAM", INK, size=7.5)
    _arrow(axes, INK, (92, 29.4), (92, 31.6))
    _picture(axes, 86, 24.2, 5)
    _text(axes, 91.8, 26.7, "and its\ntext", FAINT, ha="left", size=7.5)
    _text(axes, 70.2, 30.4, "Masks are made\nonce, before\ntraining.", FAINT, ha="left", size=7.5)


def _legend(axes: Any, config: AgeVlmConfig) -> None:
    _text(axes, 70, 20.4, "Trains in stage", INK, weight="bold", size=8.5, ha="left")
    inside = config.cross_attention_position == "after_self_attention"
    layers, crossed = config.text_config.num_hidden_layers, len(config.cross_attention_layers)
    for bottom, part, color, text in (
        (16.8, "cross", CROSS, f"{crossed} {'inner' if inside else 'cross'} block{'s' * (crossed > 1)}"),
        (14.0, "llama", LLAMA, f"Llama, {layers} layers"),
    ):
        _box(axes, None, 70, bottom, 3, 2, color, strong=part == "cross")
        _text(axes, 74, bottom + 0.95, text, INK, ha="left", size=8)
        _strip(axes, part, 88.6, bottom)
    for number, name in enumerate(STAGES, 1):
        left, bottom = 70 + 14.5 * ((number - 1) % 2), 9.9 - 2.8 * ((number - 1) // 2)
        _strip(axes, "cross", left, bottom, (number,))
        _text(axes, left + 2.9, bottom + 0.95, name, INK, ha="left", size=8)
    _strip(axes, "llama", 70, 4.3, (1,))
    _text(axes, 72.9, 5.25, "frozen, or the loss is off", INK, ha="left", size=8)
    _text(axes, 70, 2.0, "AGE-VLM-LM has the guidance loss in stage 4 too.", FAINT, ha="left", size=7.5)


def _strip(axes: Any, part: str, left: float, bottom: float, stages: Sequence[int] = (1, 2, 3, 4)) -> None:
    """One small square per stage, filled where the part trains."""
    for number, stage in enumerate(stages):
        trains, place = stage in TRAINS[part], left + 2.4 * number
        fill, ink = (INK, PAPER) if trains else (PAPER, "#9ca3af")
        axes.add_patch(Rectangle((place, bottom), 2, 2, fc=fill, ec=INK if trains else "#9ca3af", lw=0.7))
        _text(axes, place + 1, bottom + 0.95, str(stage), ink, size=7.5)


def _box(
    axes: Any, name: str | None, left: float, bottom: float, width: float, height: float, color: str,
    strong: bool = False,
) -> None:  # fmt: skip
    round_ = f"round,pad=0,rounding_size={min(0.6, height / 3)}"
    light = tuple(1 - 0.16 * (1 - int(color[place : place + 2], 16) / 255) for place in (1, 3, 5))
    fill = color if strong else light
    box = FancyBboxPatch((left, bottom), width, height, boxstyle=round_, fc=fill, ec=color, lw=0.9)
    box.set_gid(name)
    axes.add_patch(box)


def _text(
    axes: Any, x: float, y: float, text: str, color: str, ha: str = "center", va: str = "center", **style: Any
) -> None:
    axes.text(x, y, text, color=color, ha=ha, va=va, linespacing=1.25, **style)


def _line(axes: Any, color: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.plot(*zip(start, end, strict=True), color=color, lw=1.3, solid_capstyle="round")


def _arrow(axes: Any, color: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "lw": 1.3}
    axes.add_patch(FancyArrowPatch(start, end, color=color, **style))


def _picture(axes: Any, left: float, bottom: float, side: float) -> None:
    """A red apple on a table: the picture that the question is about."""
    shapes = (
        Rectangle((0, 0), 1, 1, fc="#dbeafe"),
        Rectangle((0, 0), 1, 0.3, fc="#d6b98c"),
        Polygon([(0.62, 0.3), (0.62, 0.62), (0.77, 0.8), (0.92, 0.62), (0.92, 0.3)], fc="#8fa3bf"),
        Circle((0.36, 0.42), 0.2, fc="#d62839"),
        Ellipse((0.42, 0.68), 0.16, 0.08, angle=30, fc="#3a7d44"),
        Rectangle((0, 0), 1, 1, fc="none", ec=INK, lw=0.9),
    )
    for shape in shapes:
        shape.set_transform(_placed(axes, left, bottom, side))
        axes.add_patch(shape)


def _placed(axes: Any, left: float, bottom: float, side: float) -> Any:
    return Affine2D().scale(side).translate(left, bottom) + axes.transData


def _squares(chosen: np.ndarray) -> Iterator[Outline]:
    """The cells `chosen (cells, cells)` of the unit square, first row lowest."""
    count = len(chosen)
    for row, column in np.argwhere(chosen):
        low, near = row / count, column / count
        far, high = near + 1 / count, low + 1 / count
        yield Outline([(near, low), (far, low), (far, high), (near, high), (near, low)], closed=True)


def _cells(axes: Any, chosen: np.ndarray, left: float, bottom: float, side: float, color: str, alpha: float) -> None:
    outline = Outline.make_compound_path(*_squares(chosen))
    axes.add_patch(PathPatch(outline, transform=_placed(axes, left, bottom, side), fc=color, ec="none", alpha=alpha))


def _grid(axes: Any, left: float, bottom: float, side: float, cells: int, color: str) -> None:
    lines = [Outline([(x, 0), (x, 1)]) for x in np.linspace(0, 1, cells + 1)]
    lines += [Outline([(0, y), (1, y)]) for y in np.linspace(0, 1, cells + 1)]
    outline = Outline.make_compound_path(*lines)
    axes.add_patch(PathPatch(outline, transform=_placed(axes, left, bottom, side), fc="none", ec=color, lw=0.35))
