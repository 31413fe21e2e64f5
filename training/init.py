"""`agevlm init`: the model that stage 1 starts from, made of published parts (section 4).

A Llama, a ConvNeXt (`conversion/convert_vision.py` has the layouts), the Llama's tokenizer with an image token
and a chat template, and fresh projector and cross blocks. Parts come from folders or the Hub
(`conversion/sources.py`).

Everything is resolved and built without weights first; `--dry-run` stops there. So a wrong layer index is noticed
before gigabytes are downloaded. OUT appears complete or not at all; its `agevlm_init.json` names its sources.
"""

import argparse
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from agevlm.conversion.assemble import assemble
from agevlm.conversion.convert_vision import Conversion, load_tower, plan_conversion
from agevlm.conversion.sources import Source, Weights, fetch, locate, weight_shapes
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.modeling_agevlm.modeling_agevlm import check_weights
from agevlm.models import TOKENIZER, load_processor, load_weights, reading
from agevlm.processing import AgeVlmProcessor
from agevlm.processing.build import IMAGE_TOKEN, build_processor, chat_style
from agevlm.progress import written
from agevlm.store import check_free, flatten, new_folder, write_json
from agevlm.training.defaults import IMAGE_SIZE
from agevlm.training.freezing import part_of, trainable_table
from agevlm.training.lineage import INIT_FILE, git_commit, library_versions


PAD_TOKEN = "<|finetune_right_pad_id|>"  # Llama-3.1's and 3.2's, which their tokenizers have but do not name

# Where a published tower states the mean and standard deviation of its pixels: file, field ("" for the top), keys.
NORMALIZATIONS = (
    ("config.json", "pretrained_cfg", "mean", "std"),  # timm
    ("open_clip_config.json", "preprocess_cfg", "mean", "std"),
    ("preprocessor_config.json", "", "image_mean", "image_std"),  # transformers
)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before any weights are read."""

    language_source: Source
    vision_source: Source
    language_config: LlamaConfig
    conversion: Conversion
    processor: AgeVlmProcessor
    cross_attention_layers: tuple[int, ...] | None
    cross_attention_position: str


def language_part(source: Source) -> LlamaConfig:
    """The configuration of the language model.

    Raises:
        ValueError: no model of the Llama family.
    """
    model_type = source.configuration().get("model_type")
    if model_type != "llama":
        raise ValueError(
            f"{source.name} holds a model of type {model_type!r}. The language model must be of type 'llama' "
            "(Llama-3.2-1B, SmolLM2 and the like)."
        )
    with reading(source.name, "config.json"):
        return AutoConfig.from_pretrained(source.folder)


def load_tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The language model's tokenizer.

    Raises:
        ValueError: there is none.
    """
    if not (source.folder / "tokenizer.json").is_file():
        raise ValueError(f"{source.name} holds no tokenizer.json. Save the tokenizer into the model's folder.")
    with reading(source.name, TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    if tokenizer.pad_token is None and PAD_TOKEN in tokenizer.get_vocab():
        tokenizer.pad_token = PAD_TOKEN
    return tokenizer


def stated_normalization(source: Source) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the pixels that a published tower was trained on, None where it does not say."""
    for file, field, mean, std in NORMALIZATIONS:
        settings = source.configuration(file)
        settings = settings.get(field, {}) if field else settings
        if mean in settings and std in settings:
            return list(settings[mean]), list(settings[std])
    return None


def plan_parts(args: argparse.Namespace) -> Plan:
    """Resolve what the flags ask for.

    Raises:
        ValueError: a part that cannot be found or does not fit.
    """
    image_size = args.image_size
    if args.parts is not None:
        if not (args.parts / "language_model").is_dir():
            raise ValueError(f"{args.parts} holds no parts. Make them: agevlm parts tiny --output OUT.")
        language_source = locate(str(args.parts / "language_model"))
        vision_source = locate(str(args.parts / "vision_tower"))
        made = load_processor(args.parts, ours=True)
        tokenizer = made.tokenizer
        image_size = image_size or made.image_processor.size["height"]
    else:
        language_source, vision_source = locate(args.language_model), locate(args.vision_tower)
        tokenizer = None
    language_config = language_part(language_source)
    conversion = plan_conversion(
        weight_shapes(vision_source), hidden_act=vision_source.configuration().get("hidden_act", "gelu")
    )
    processor = build_processor(tokenizer or load_tokenizer(language_source), image_size or IMAGE_SIZE)
    stride = conversion.config.patch_size * 2 ** (conversion.config.num_stages - 1)
    if stride != processor.image_processor.cell_size:
        raise ValueError(
            f"{vision_source.name} makes one cell of {stride} pixels; the image processor's cells have "
            f"{processor.image_processor.cell_size}. Take a ConvNeXt of four stages with patches of 4 pixels."
        )
    normalization = stated_normalization(vision_source)
    if normalization is not None:
        processor.image_processor.image_mean, processor.image_processor.image_std = normalization
    layers = args.cross_attention_layers
    return Plan(
        language_source,
        vision_source,
        language_config,
        conversion,
        processor,
        None if layers is None else tuple(layers),
        args.cross_attention_position,
    )


def join_parts(
    plan: Plan, language_model: LlamaForCausalLM, tower: ConvNextModel, seed: int
) -> AgeVlmForConditionalGeneration:
    """The model around its parts; new weights are drawn from `seed`.

    Raises:
        ValueError: cross-attention layers that do not fit the stack.
    """
    tokenizer = plan.processor.tokenizer
    set_seed(seed)
    if len(tokenizer) > language_model.config.vocab_size:
        # New rows are drawn around the mean of the old ones, which is not there without weights.
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=language_model.device.type != "meta")
    generation = language_model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    # An answer ends where the chat template ends a turn, whatever else ends one for this model.
    known = sorted({end for end in ends if end is not None} | {tokenizer.eos_token_id})
    generation.eos_token_id = known if len(known) > 1 else known[0]
    generation.pad_token_id = tokenizer.pad_token_id
    try:
        return assemble(
            language_model,
            tower,
            plan.processor.image_token_id,
            plan.cross_attention_layers,
            cross_attention_position=plan.cross_attention_position,
        ).eval()
    except StrictDataclassClassValidationError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def without_weights(plan: Plan, seed: int) -> AgeVlmForConditionalGeneration:
    """The model on the meta device: its shapes and configuration alone.

    Raises:
        ValueError: see `join_parts`.
    """
    with torch.device("meta"):
        # A copy, because adding tokens changes the configuration.
        language_model = LlamaForCausalLM(deepcopy(plan.language_config))
        return join_parts(plan, language_model, ConvNextModel(plan.conversion.config), seed)


def build(plan: Plan, seed: int, from_scratch: bool = False) -> AgeVlmForConditionalGeneration:
    """The model of a plan in float32, its weights fetched if need be.

    Args:
        from_scratch: draw the language model's weights from `seed` in place of reading them.

    Raises:
        ValueError: weights that are damaged, not finite or not those of their configuration; see also `join_parts`.
    """
    if from_scratch:
        set_seed(seed)
        language_model = LlamaForCausalLM(plan.language_config)
    else:
        folder = fetch(plan.language_source)[0].parent
        language_model = load_weights(LlamaForCausalLM, folder, exact=True, dtype=torch.float32, use_safetensors=True)
    tower = load_tower(plan.conversion, Weights(plan.vision_source))
    check_weights(tower, {"missing_keys": (), "unexpected_keys": ()}, plan.vision_source.name)
    return join_parts(plan, language_model, tower, seed)


def count_parameters(model: AgeVlmForConditionalGeneration) -> dict[str, int]:
    """Parameters of the four parts and of all together. Tied weights count once."""
    counts = dict.fromkeys(("vision", "projector", "cross_attention", "language_model"), 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def _shown(source: Source) -> str:
    """A repository's id, or the name of a folder or file, whose place says nothing about the model."""
    return source.name if source.revision is not None else Path(source.name).resolve().name


def describe(plan: Plan, model: AgeVlmForConditionalGeneration, dtype: str, seed: int) -> dict[str, Any]:
    """The parts of the model, JSON-ready."""
    text, image = model.config.text_config, plan.processor.image_processor
    sources = {"language_model": plan.language_source, "vision_tower": plan.vision_source}
    parts: dict[str, dict[str, Any]] = {
        part: {"source": _shown(source), "revision": source.revision, "files": list(source.weights)}
        for part, source in sources.items()
    }
    parts["language_model"] |= {
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "added_to_vocabulary": text.vocab_size - plan.language_config.vocab_size,
    }
    parts["vision_tower"] |= {
        "layout": plan.conversion.layout,
        "depths": plan.conversion.config.depths,
        "hidden_sizes": plan.conversion.config.hidden_sizes,
        "left_out": plan.conversion.left_out,
    }
    return {
        **parts,
        "image_size": image.size["height"],
        "visual_tokens": image.grid[0] * image.grid[1],
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
        "image_token": {"token": IMAGE_TOKEN, "id": plan.processor.image_token_id},
        "chat_style": chat_style(plan.processor.tokenizer).name,
        "cross_attention_layers": model.config.cross_attention_layers,
        "cross_attention_position": model.config.cross_attention_position,
        "dtype": dtype,
        "seed": seed,
        "parameters": count_parameters(model),
    }


def show(record: dict[str, Any], model: AgeVlmForConditionalGeneration, console: Console) -> None:
    """Print the parts of the model and their sizes."""
    table = Table("", "", title="The model that stage 1 starts from", show_header=False)
    for name, value in flatten(record):
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else str(value).strip("[]")
            table.add_row(name.replace("_", " ").replace(".", ", "), text)
    console.print(table)
    table = Table("module", title="Parameters")
    table.add_column("count", justify="right")
    for row in trainable_table(model)[:-1]:
        table.add_row(row.module, f"{row.total:,}")
    console.print(table)


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm init`, with the arguments of `cli.py`.

    Raises:
        ValueError: a folder that is in use, or parts that cannot be had or do not fit.
    """
    check_free(args.output)
    console = Console(markup=False)
    plan = plan_parts(args)
    shapes = without_weights(plan, args.seed)
    record = describe(plan, shapes, args.dtype, args.seed)
    show(record, shapes, console)
    if args.dry_run:
        return
    model = build(plan, args.seed).to(getattr(torch, args.dtype))
    with new_folder(args.output) as temporary:
        model.save_pretrained(temporary)
        plan.processor.save_pretrained(temporary)
        write_json(temporary / INIT_FILE, {**record, "git_commit": git_commit(), "versions": library_versions()})
    written(args.output, "agevlm train stage1_align --init-from {} --data DATA")
