"""Loads vision-language models, ours or any image-text-to-text model of transformers, and encodes questions to them.

transformers draws missing weights at random and only logs it. Here a checkpoint is complete and finite and fits its
configuration, or loading ends in a `CheckpointError`. AGE-VLM checkpoints run the installed code, never the code that
lies beside their weights.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.modeling_agevlm.configuration_agevlm import AUTO_MAP
from agevlm.modeling_agevlm.modeling_agevlm import check_weights
from agevlm.processing import AgeVlmProcessor
from agevlm.store import digest, read_text


Name = str | PathLike[str]
OURS = AgeVlmConfig.model_type
FIX = "Restore the file, or download the checkpoint again."
MODEL = f"its model ({CONFIG_NAME}, {GENERATION_CONFIG_NAME})"
TOKENIZER = "its tokenizer (tokenizer.json, tokenizer_config.json)"
PROCESSOR = "its processor (processor_config.json, tokenizer.json, tokenizer_config.json)"
# Fields of configurations that name code which Auto classes and pipelines fetch and run.
CODE_FIELDS = ("auto_map", "custom_pipelines")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names it, the file or field, and the fix."""


@contextmanager
def reading(name: Name, what: str) -> Iterator[None]:
    """Turn whatever libraries raise while they read `what` of a checkpoint into one sentence.

    Raises:
        CheckpointError: for every error but an accelerator's exhausted memory.
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = " ".join(str(error).split())
        if HFValidationError in (type(error), type(error.__cause__)):
            raise CheckpointError(f"{name} is neither a folder nor the id of a repository.") from error
        if isinstance(error, ValueError) and cause.startswith(f"{name}: "):  # it says what it is about
            raise CheckpointError(cause) from error
        if isinstance(error, ImportError):
            raise CheckpointError(f"{name}: {what} needs a package that is missing: {cause}") from error
        if isinstance(error, OSError) and not Path(name).is_dir():
            raise CheckpointError(
                f"{name} cannot be loaded: {cause} Give a folder or the id of a repository; log in with "
                "`hf auth login` if it is private or gated."
            ) from error
        cause = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
        raise CheckpointError(f"{name}: {what} cannot be used ({cause}). {FIX}") from error


# ---- Configuration ----


def _read_table(name: Name, file: str, revision: str, required: bool = False) -> dict[str, Any] | None:
    """The fields of a JSON file of a checkpoint, None if it has no such file. A required one may be out of reach."""
    with reading(name, file):
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=required)
        if path is None:
            return None
        fields = json.loads(read_text(Path(path)))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds no table of fields but {type(fields).__name__}")
    return fields


def read_settings(name: Name, revision: str = "main") -> dict[str, Any]:
    """The fields of a checkpoint's `config.json` as they are stored.

    Raises:
        CheckpointError: there is no such file, or it holds no table in JSON.
    """
    settings = _read_table(name, CONFIG_NAME, revision, required=True)
    if settings is None:
        raise CheckpointError(
            f"{name} is no checkpoint: it has no {CONFIG_NAME}. Give a folder or the id of a repository."
        )
    return settings


def model_type(name: Name, revision: str = "main", *, ours: bool = False) -> str | None:
    """The model type that a checkpoint states; None if it states none.

    Args:
        ours: refuse models other than AGE-VLM.

    Raises:
        CheckpointError: there is no checkpoint of that name, or not of AGE-VLM under `ours`.
    """
    found = read_settings(name, revision).get("model_type")
    if ours and found != OURS:
        raise CheckpointError(f"{name} is no AGE-VLM checkpoint: its model type is {found!r}, not {OURS!r}")
    return found


def load_config(name: Name, revision: str = "main", *, ours: bool = False) -> PreTrainedConfig:
    """A checkpoint's configuration.

    Args:
        ours: refuse models other than AGE-VLM.

    Raises:
        CheckpointError: a damaged `config.json`, or one that describes more layers than a folder's weights have.
    """
    model_type(name, revision, ours=ours)
    if Path(name).is_dir():
        _check_depth(name, read_settings(name), len(stored_shapes(name)))
    with reading(name, CONFIG_NAME):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _check_depth(name: Name, fields: Mapping[str, Any], tensors: int) -> None:
    """Every layer has a tensor of its own. To build 100,000 layers and find them missing would take minutes."""
    for field, value in fields.items():
        if isinstance(value, Mapping):
            _check_depth(name, value, tensors)
        elif tensors and ("layers" in field or "depth" in field):
            numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
            if max(numbers, default=0) > tensors:
                raise CheckpointError(
                    f"{name}: {CONFIG_NAME} has {field} = {value}, but the weights are {tensors} tensors. {FIX}"
                )


def _check_kind(name: Name, fields: Mapping[str, Any], trust_remote_code: bool) -> None:
    found, code = fields.get("model_type"), fields.get("auto_map") or {}
    if found in CONFIG_MAPPING and CONFIG_MAPPING[found] in AutoModelForImageTextToText._model_mapping:
        return
    if AutoModelForImageTextToText.__name__ not in code:
        raise CheckpointError(f"{name} is no image-text-to-text model: its model type is {found!r}")
    if not trust_remote_code:
        raise CheckpointError(
            f"{name} needs code of its own: transformers has no image-text-to-text model of type {found!r}. Read the "
            "code, and if you trust it, add `--trust-remote-code` (`trust_remote_code=True`)."
        )


def _forget_code(config: PreTrainedConfig) -> None:
    """Drop a configuration's references to code. It is not run here, and would be saved again."""
    for field in CODE_FIELDS:
        vars(config).pop(field, None)
    for part in config.sub_configs:
        if isinstance(getattr(config, part, None), PreTrainedConfig):
            _forget_code(getattr(config, part))
    if isinstance(config, AgeVlmConfig):
        config.auto_map = dict(AUTO_MAP)


# ---- Weights ----


def stored_shapes(name: Name, revision: str = "main") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's safetensors, fetched if need be; empty where there are none.

    Raises:
        CheckpointError: a file is missing, or it is damaged.
    """
    files: Sequence[str] = []
    with reading(name, SAFE_WEIGHTS_INDEX_NAME):
        find = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if (path := cached_file(name, SAFE_WEIGHTS_NAME, **find)) is not None:
            files = [path]
        elif (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **find)) is not None:
            files, _ = get_checkpoint_shard_files(name, index, revision=revision)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with reading(name, Path(file).name), safe_open(file, "pt") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return shapes


def load_weights(
    model_class: Any, name: Name, *, exact: bool = False, revision: str = "main", **settings: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained` that refuses weights that do not fit.

    Args:
        model_class: a class of transformers; without `exact` one of its Auto classes too.
        exact: refuse every tensor that the model has no place for. Otherwise only those of layers that it lacks:
            published checkpoints hold heads and buffers that transformers leaves out on purpose.
        settings: of `from_pretrained`.

    Raises:
        CheckpointError: missing, unexpected, misshapen or non-finite tensors, or a damaged file.
    """
    fields, shapes = read_settings(name, revision), stored_shapes(name, revision)
    _check_depth(name, fields, len(shapes))
    # Under ZeRO-3 modules are made of parts of tensors.
    if exact and shapes and "quantization_config" not in fields and not is_deepspeed_zero3_enabled():
        _check_shapes(name, model_class, load_config(name, revision), shapes)
    _read_table(name, GENERATION_CONFIG_NAME, revision)  # transformers passes over a damaged one in silence
    with reading(name, MODEL):
        model, report = model_class.from_pretrained(
            name, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
        _check_report(name, model, report, exact)
    return model


def _check_shapes(
    name: Name, model_class: Any, config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the stored tensors with those of the configuration, before memory is taken for either."""
    with reading(name, CONFIG_NAME), torch.device("meta"):
        model = model_class(config)
        tied = model.all_tied_weights_keys
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}
        report = {
            "missing_keys": [key for key in expected if key not in shapes],
            "unexpected_keys": [key for key in shapes if key not in expected and key not in tied],
            "mismatched_keys": [
                (key, shapes[key], shape) for key, shape in expected.items() if shapes.get(key, shape) != shape
            ],
        }
        _check_report(name, model, report, exact=True)


def _check_report(name: Name, model: PreTrainedModel, report: Mapping[str, Any], exact: bool) -> None:
    """`check_weights` of what counts in a report, with the shapes that do not fit."""

    def layer(key: str) -> str:
        return re.sub(r"\.\d+\.", ".*.", key)

    layers = {layer(key) for key, _ in model.named_parameters()}
    misshapen = (
        f"{key} with {tuple(stored)} in the file and {tuple(expected)} in the model"
        for key, stored, expected in report["mismatched_keys"]
    )
    unexpected = [key for key in report["unexpected_keys"] if exact or layer(key) in layers]
    report = {**report, "unexpected_keys": unexpected, "mismatched_keys": [(said,) for said in misshapen]}
    check_weights(model, report, name)


# ---- Whole models ----


def load_model(
    name: Name,
    *,
    ours: bool = False,
    revision: str = "main",
    adapter: str | None = None,
    four_bit: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Any:
    """A vision-language model in eval mode; in its stored dtype and on the accelerator unless `settings` differ.

    Args:
        name: folder or Hub id.
        ours: refuse models other than AGE-VLM.
        adapter: folder or Hub id of a PEFT adapter, laid over the model.
        four_bit: NF4 weights, computed in bfloat16 (bitsandbytes).
        trust_remote_code: run the code of a checkpoint that is not ours.
        settings: of `from_pretrained`.

    Raises:
        CheckpointError: see `load_weights`; or it is no image-text-to-text model, or a library is missing.
    """
    if four_bit:
        if find_spec("bitsandbytes") is None:
            raise CheckpointError("4-bit loading needs bitsandbytes, which is not installed: pip install bitsandbytes")
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    settings = {"dtype": "auto", "device_map": accelerator(), "revision": revision, **settings}
    if model_type(name, revision, ours=ours) == OURS:
        model = load_weights(AgeVlmForConditionalGeneration, name, exact=True, use_safetensors=True, **settings)
    else:
        _check_kind(name, read_settings(name, revision), trust_remote_code)
        settings["trust_remote_code"] = trust_remote_code
        model = load_weights(AutoModelForImageTextToText, name, **settings)
    if adapter is not None:
        with reading(adapter, "the adapter"):
            report = model.load_adapter(adapter, ignore_mismatched_sizes=True).to_dict()
            _check_report(adapter, model, report, exact=True)
    if not trust_remote_code:
        _forget_code(model.config)
    return model.eval()


def accelerator() -> torch.device | None:
    """This machine's accelerator, None where there is none."""
    return torch.accelerator.current_accelerator(check_available=True)


def load_processor(name: Name, *, ours: bool = False, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """A vision-language model's processor, which can ask about a picture.

    Args:
        ours: of an AGE-VLM; no `config.json` is needed.
        trust_remote_code: run the code of a checkpoint that is not ours.

    Raises:
        CheckpointError: a damaged file or field, or no chat template.
    """
    with reading(name, PROCESSOR):
        processor = (AgeVlmProcessor if ours else AutoProcessor).from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    _check_processor(name, processor)
    if not trust_remote_code:
        for part in (processor, *(getattr(processor, part) for part in processor.get_attributes())):
            for field in CODE_FIELDS:
                vars(part).pop(field, None)
                getattr(part, "init_kwargs", {}).pop(field, None)
    return processor


def _check_processor(name: Name, processor: Any) -> None:
    if getattr(processor, "image_processor", None) is None:
        raise CheckpointError(f"{name}: its processor takes no pictures. Give a vision-language model.")
    if processor.chat_template is None:
        raise CheckpointError(
            f"{name}: its processor has no chat template, which says how to ask it. Add one and save it."
        )
    with reading(name, "the chat template (chat_template.jinja)"):
        render(processor, "What is this?")
    for field in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(processor.image_processor, field, None)
        numbers = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) and (n or field == "image_mean") for n in numbers):
            raise CheckpointError(
                f"{name}: {field} of its image processor is {value!r} (processor_config.json). {FIX}"
            )
    if isinstance(processor, AgeVlmProcessor):
        with reading(name, "the image processor (processor_config.json)"):
            white = processor.image_processor(Image.new("RGB", (64, 48), "white"), return_tensors="pt")
            if not white["pixel_values"].isfinite().all():
                raise ValueError("a white picture becomes pixels that are not finite")


def load(
    name: Name, *, ours: bool = False, revision: str = "main", trust_remote_code: bool = False, **settings: Any
) -> tuple[Any, Any]:
    """Model and processor of one checkpoint; see `load_model` and `load_processor`.

    Raises:
        CheckpointError: besides, an AGE-VLM whose image token or vocabulary is not its processor's.
    """
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_model(name, ours=ours, **common, **settings)
    processor = load_processor(name, ours=model.config.model_type == OURS, **common)
    if isinstance(processor, AgeVlmProcessor):
        rows = model.get_input_embeddings().num_embeddings
        found, known = model.config.image_token_id, processor.image_token_id
        if found != known or len(processor.tokenizer) > rows:
            raise CheckpointError(
                f"{name}: model and processor do not belong together: image_token_id is {found} in {CONFIG_NAME} and "
                f"{known} in the tokenizer, which has {len(processor.tokenizer)} tokens for {rows} embeddings. {FIX}"
            )
    return model, processor


def unique_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, as the name of a model.

    Raises:
        ValueError: two are the same.
    """
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) != len(names):
        raise ValueError(f"two models are called the same ({', '.join(names)}); rename a folder")
    return names


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of up to 64 evenly spaced values of every parameter: tells checkpoints apart in milliseconds."""

    def pieces() -> Iterator[str | bytes]:
        for name, parameter in model.named_parameters():
            values = parameter.detach().reshape(-1)
            yield f"{name} {tuple(parameter.shape)}"
            yield values[:: max(1, values.numel() // 64)].float().cpu().numpy().tobytes()

    return digest(pieces())


# ---- Questions ----


def messages(prompt: str, pictures: int = 1, before: Sequence[tuple[str, str]] = ()) -> list[dict[str, Any]]:
    """The conversation that asks `prompt` after other questions and their answers, its pictures first of all."""
    turns = [[{"type": "text", "text": text}] for text in (*chain.from_iterable(before), prompt)]
    turns[0] = [{"type": "image"}] * pictures + turns[0]
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def control_tokens(processor: Any) -> re.Pattern[str]:
    """Finds the tokens that end a text, begin another turn or stand for a picture, the longest where several fit."""
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special} | {getattr(processor, "image_token", None) or ""}
    spelled = sorted(filter(str.strip, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")


def check_text(tokens: re.Pattern[str], text: str, where: str = "the text") -> None:
    """Raises ValueError if a text spells one of the `control_tokens` of a model."""
    found = tokens.search(text)
    if found:
        raise ValueError(f"{where} holds {found.group()!r}, a control token of the model; write it otherwise")


def check_messages(tokens: re.Pattern[str], row: Mapping[str, Any], placeholder: str) -> None:
    """`check_text` for the messages of a row, in which `placeholder` stands for its pictures."""
    for index, message in enumerate(row["messages"]):
        words = message["content"].replace(placeholder, " ")
        check_text(tokens, words, f"row (id {row['id']!r}): messages[{index}].content")


def render(
    processor: Any,
    prompt: str,
    pictures: int = 1,
    before: Sequence[tuple[str, str]] = (),
    *,
    answer_next: bool = True,
) -> str:
    """The text of `messages` in the model's own chat format; with `answer_next` the header of the answer follows.

    Raises:
        ValueError: a text spells a control token of the model, such as its place of a picture.
    """
    tokens = control_tokens(processor)
    for text in (*chain.from_iterable(before), prompt):
        check_text(tokens, text)
    asked = messages(prompt, pictures, before)
    return processor.apply_chat_template(asked, add_generation_prompt=answer_next, tokenize=False)


def encode(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image | Sequence[Image.Image] | None],
    texts: Sequence[str],
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Inputs of a left-padded batch, on the model's device and in its dtype.

    Args:
        images: the picture of each row or its pictures, None where a row is text alone.
        texts: the rows as `render` writes them.
        settings: of the processor, such as `guidance_spans` and `guidance_masks` of ours.
    """
    pictures = [[image] if isinstance(image, Image.Image) else [*(image or ())] for image in images]
    batch = processor(
        images=pictures if any(pictures) else None,
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **settings,
    ).to(model.device, model.dtype)
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
