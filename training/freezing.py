"""Which parameters a training stage moves (paper Table 1), and a table of what that comes to.

Parts:
- `projector`: the two linear layers between the tower and the language model.
- `cross_attention`: the interleaved cross-attention blocks (attention, MLP, norms, gates).
- `vision_last_stage`, `vision_last_block`, `vision_all`: of the ConvNeXt. The paper's "final block" is read as the
  last stage, which is what ConvLLaVA, its motivation, unfreezes; the other readings are the other two names.
- `language_model`: Llama's own weights (self-attention, FFN, norms, embeddings, head). Table 1 names the column
  "LLM(SA)"; the text says "self-attention and FFN weights".
- `self_attention`: the attention and its input norm in Llama's own layers, to be frozen inside `language_model`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from rich.table import Table
from torch import nn
from transformers import PreTrainedModel


PARTS = (
    "projector",
    "cross_attention",
    "vision_last_block",
    "vision_last_stage",
    "vision_all",
    "language_model",
    "self_attention",
)


class TableRow(NamedTuple):
    """Parameters of one module: how many there are and how many of them train."""

    module: str
    total: int
    trainable: int


def part_of(name: str) -> str:
    """The part that owns a parameter: `vision`, `projector`, `cross_attention` or `language_model`.

    `name` is the parameter's name in an AGE-VLM, also behind the prefixes that PEFT and data-parallel wrappers add.
    """
    path = name.split(".")
    if "vision_tower" in path:
        return "vision"
    if "multi_modal_projector" in path:
        return "projector"
    if "cross_attention_layers" in path:
        return "cross_attention"
    return "language_model"


def set_trainable(model: PreTrainedModel, parts: Iterable[str], frozen: Iterable[str] = ()) -> None:
    """Let exactly `parts` of an AGE-VLM train, except what `frozen` takes out of them; everything else is frozen.

    Args:
        model (`AgeVlmForConditionalGeneration`): changed in place (`requires_grad`).
        parts, frozen (iterables of `str`): names from `PARTS`.

    Raises:
        ValueError: an unknown part, or parts that leave nothing to train.
    """
    parts, frozen = tuple(parts), tuple(frozen)
    for part in (*parts, *frozen):
        if part not in PARTS:
            raise ValueError(f"Unknown part '{part}' of the model. Choose from {', '.join(PARTS)}.")
    trains = {id(p) for part in parts for p in _parameters(model, part)}
    trains -= {id(p) for part in frozen for p in _parameters(model, part)}
    if not trains:
        raise ValueError(f"Nothing is left to train with parts={list(parts)} and frozen={list(frozen)}.")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trains)


def _parameters(model: PreTrainedModel, part: str) -> Iterator[nn.Parameter]:
    tower = model.model.vision_tower
    if part == "vision_all":
        # A stock ConvNeXt (`conversion/twin.py`) also has the pooled vector's norm, which nothing reads.
        yield from (p for name, p in tower.named_parameters() if not name.startswith("layernorm."))
    elif part == "vision_last_stage":
        yield from tower.encoder.stages[-1].parameters()
    elif part == "vision_last_block":
        yield from tower.encoder.stages[-1].layers[-1].parameters()
    elif part == "self_attention":
        added = _added_layers(model)
        for layer in model.model.language_model.layers:
            if layer not in added:
                yield from layer.self_attn.parameters()
                yield from layer.input_layernorm.parameters()
    else:
        added_ones = {id(p) for layer in _added_layers(model) for p in layer.parameters()}
        for name, parameter in model.named_parameters():
            owner = "cross_attention" if id(parameter) in added_ones else part_of(name)
            if owner == part:
                yield parameter


def _added_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that stand for cross blocks in a concatenating twin of equal size (`conversion/twin.py`)."""
    layers = model.model.language_model.layers
    return [layers[index] for index in getattr(model.config.get_text_config(), "added_layers", ())]


def trainable_table(model: PreTrainedModel) -> list[TableRow]:
    """Parameter counts of an AGE-VLM, one row per module and a last row `total`. Tied weights count once."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if "original_module" in name.split("."):
            continue  # PEFT keeps what it copies; the copy counts
        row = counts.setdefault(_module_of(name), [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    rows = [TableRow(module, *row) for module, row in counts.items()]
    return [*rows, TableRow("total", sum(row.total for row in rows), sum(row.trainable for row in rows))]


def _module_of(name: str) -> str:
    part, path = part_of(name), name.split(".")
    if part == "vision":
        return f"vision stage {int(path[path.index('stages') + 1]) + 1}" if "stages" in path else "vision embeddings"
    if part == "projector":
        return "projector"
    if part == "cross_attention":
        return "cross-attention blocks"
    if "self_attn" in path or "input_layernorm" in path:
        return "LLM self-attention"
    if "mlp" in path or "post_attention_layernorm" in path:
        return "LLM FFN"
    if "embed_tokens" in path:
        return "LLM embeddings"
    return "LLM head and final norm"


def format_table(rows: list[TableRow]) -> Table:
    """`rows` of `trainable_table` for a rich console."""
    table = Table("module", title="What trains")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    for row in rows:
        table.add_row(
            row.module,
            f"{row.total:,}",
            f"{row.trainable:,}" if row.trainable else "frozen",
            style="bold" if row.module == "total" else None,
        )
    return table
