"""Kinds of damage to a checkpoint's folder, and what is said about them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file


WEIGHTS, CONFIG, PROCESSOR, TEMPLATE = (
    "model.safetensors",
    "config.json",
    "processor_config.json",
    "chat_template.jinja",
)
BIAS = "model.multi_modal_projector.linear_1.bias"


def rewrite(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content)


def set_field(file: str, *path: str, value) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        table = fields
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = value
        (folder / file).write_text(json.dumps(fields))

    return damage


def change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return damage


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def without(part: str) -> Callable[[Path], None]:
    """Takes all tensors out whose names hold `part`."""
    return change_weights(lambda weights: {name: weights[name] for name in weights if part not in name})


def filled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: weights | {name: torch.full_like(weights[name], value)}


NAN = float("nan")
OF_WEIGHTS = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"no file named model\.safetensors"),
    "weights cut off": (cut(WEIGHTS, 1000), r"model\.safetensors cannot be used \(SafetensorError"),
    "weights cut off late": (cut(WEIGHTS, -1000), r"model\.safetensors cannot be used \(SafetensorError"),
    "weights empty": (cut(WEIGHTS, 0), r"model\.safetensors cannot be used \(SafetensorError"),
    "missing tensors": (without("vision_tower"), r"\d+ missing \(model\.vision_tower\.embeddings"),
    "unexpected tensor": (
        change_weights(lambda w: w | {"model.extra": torch.ones(2)}),
        r"1 unexpected \(model\.extra\)",
    ),
    "misshapen tensor": (
        change_weights(lambda w: w | {BIAS: torch.ones(3)}),
        rf"1 of another shape \({BIAS} with \(3,\) in the file and \(32,\) in the model",
    ),
    "NaN": (change_weights(filled(BIAS, NAN)), rf"1 not finite \({BIAS}\)"),
    "infinity": (change_weights(filled(BIAS, float("inf"))), rf"1 not finite \({BIAS}\)"),
    "six layers of four": (
        set_field(CONFIG, "text_config", "num_hidden_layers", value=6),
        r"18 missing \(model\.language_model\.layers\.4",
    ),
    "three layers of four": (
        set_field(CONFIG, "text_config", "num_hidden_layers", value=3),
        r"9 unexpected \(model\.language_model\.layers\.3",
    ),
    "huge vocabulary": (
        set_field(CONFIG, "text_config", "vocab_size", value=10**10),
        r"1 of another shape \(model\.language_model\.embed_tokens\.weight with .* and \(10000000000, 32\) in the",
    ),
}
OF_CONFIG = {
    "100,000 layers": (
        set_field(CONFIG, "text_config", "num_hidden_layers", value=100_000),
        r"config\.json has num_hidden_layers = 100000, but the weights are \d+ tensors",
    ),
    "100,000 blocks": (
        set_field(CONFIG, "vision_config", "depths", value=[1, 1, 100_000, 1]),
        r"config\.json has depths = \[1, 1, 100000, 1\]",
    ),
    "no config": (lambda folder: (folder / CONFIG).unlink(), r"is no checkpoint: it has no config\.json"),
    "empty config": (rewrite(CONFIG, ""), r"config\.json cannot be used \(JSONDecodeError"),
    "config cut off": (cut(CONFIG, 100), r"config\.json cannot be used \(JSONDecodeError"),
    "config a list": (rewrite(CONFIG, "[]"), r"config\.json cannot be used .*no table of fields but list"),
    "text_config a string": (
        set_field(CONFIG, "text_config", value="x"),
        r"config\.json cannot be used .*`text_config` must be of type 'llama', got 'str'",
    ),
    "layers a string": (
        set_field(CONFIG, "cross_attention_layers", value="x"),
        r"config\.json cannot be used .*'cross_attention_layers'",
    ),
    "no heads": (set_field(CONFIG, "text_config", "num_attention_heads", value=0), r"config\.json cannot be used"),
    "another model": (set_field(CONFIG, "model_type", value="bert"), "image-text-to-text model of type 'bert'"),
}
OF_PROCESSOR = {
    "cell_size 0": (
        set_field(PROCESSOR, "image_processor", "cell_size", value=0),
        r"processor_config\.json.*`cell_size`",
    ),
    "mean a string": (
        set_field(PROCESSOR, "image_processor", "image_mean", value="a"),
        "image_mean of its image processor is 'a'",
    ),
    "std of zeros": (
        set_field(PROCESSOR, "image_processor", "image_std", value=[0, 0, 0]),
        r"image_std of its image processor is .*processor_config\.json",
    ),
    "std not finite": (set_field(PROCESSOR, "image_processor", "image_std", value=[1, NAN, 1]), "image_std"),
    "rescale_factor 0": (set_field(PROCESSOR, "image_processor", "rescale_factor", value=0), "rescale_factor"),
    "rescale_factor beyond float32": (
        set_field(PROCESSOR, "image_processor", "rescale_factor", value=1e39),
        "pixels that are not finite",
    ),
    "size 0": (set_field(PROCESSOR, "image_processor", "size", value={"height": 0, "width": 0}), "`size`"),
    "empty processor": (rewrite(PROCESSOR, ""), r"processor_config\.json"),
    "template that does not parse": (
        rewrite(TEMPLATE, "{% for message in"),
        r"chat_template\.jinja\) cannot be used \(TemplateSyntaxError",
    ),
    "template of another chat": (rewrite(TEMPLATE, "{{ messages[7].x.y }}"), r"chat_template\.jinja\) cannot be used"),
    "no template": (lambda folder: (folder / TEMPLATE).unlink(), "no chat template"),
    "tokenizer cut off": (cut("tokenizer.json", 1000), r"tokenizer\.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json"),
}
OF_BOTH = {
    "image token": (
        set_field(CONFIG, "image_token_id", value=9),
        "image_token_id is 9 in config.json and 7 in the tok",
    ),
    "generation config cut off": (cut("generation_config.json", 20), r"generation_config\.json cannot be used"),
}
ALL = OF_WEIGHTS | OF_CONFIG | OF_PROCESSOR | OF_BOTH


def refuses(act: Callable[[], object], folder: Path, message: str) -> None:
    """`act` ends in one line that matches `message` and names the folder."""
    with pytest.raises(ValueError, match=message) as caught:
        act()
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
