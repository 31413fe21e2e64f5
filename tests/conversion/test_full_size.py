"""Published names and shapes at full size, on the meta device: every one of them finds its place."""

import json
import re
from pathlib import Path

import published_baselines as published
import pytest
import torch
from tiny_baselines import LLAVA
from transformers import ConvNextModel, LlamaTokenizer

from agevlm.conversion import convllava, mobilevlm
from agevlm.conversion.layout import check_names
from agevlm.conversion.sources import Source


class Shapes:
    """Stands in for `Weights`: names and shapes, nothing else."""

    def __init__(self, shapes: dict[str, list[int]], name: str = "published"):
        self.name = name
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}

    def __iter__(self):
        return iter(self.shapes)

    def matching(self, pattern: str) -> tuple[str, ...]:
        return tuple(key for key in self.shapes if re.fullmatch(pattern, key))


VICUNA = {"hidden": 4096, "mlp": 11008, "layers": 32, "vocab": 32000}
MOBILE_LLAMA = {
    "1.7B": {"hidden": 2048, "mlp": 5632, "layers": 24, "vocab": 32000},
    "3B": {"hidden": 2560, "mlp": 6912, "layers": 32, "vocab": 32000},
    "7B": VICUNA,
}
CLIP_L = published.clip(width=1024, mlp=4096, layers=24, heads=16, patch=14, size=336)
FIVE_STAGES = ([3, 3, 27, 3, 6], [192, 384, 768, 1536, 3072])


def full_size_folder(folder: Path, llama: dict, **config) -> Source:
    """Configuration and a tokenizer of the published size."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 32000)}
    LlamaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    stated = {
        **LLAVA, "hidden_size": llama["hidden"], "intermediate_size": llama["mlp"],
        "num_hidden_layers": llama["layers"], "num_attention_heads": 32 if llama["hidden"] != 2048 else 16,
        "vocab_size": llama["vocab"], **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(stated))
    return Source("published", folder, None, ())


def parameters(shapes: dict) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize(("pixels", "tokens"), [(768, 144), (1024, 256), (1536, 576)])
def test_full_size_convllava(pixels, tokens, tmp_path, monkeypatch):
    depths, widths = FIVE_STAGES
    tower = published.convnext(depths, widths)
    shapes = published.system_shapes(published.llama_shapes(**VICUNA), tower)
    # what is known of the published index: its size, and that of the tower
    assert len(shapes) == 695
    assert parameters(published.shapes_of(ConvNextModel, tower)) == pytest.approx(669.2e6, rel=1e-3)
    assert published.index_bytes(shapes, 2, 2 * parameters(shapes)) == 70_781
    monkeypatch.setattr(convllava, "Weights", lambda source: Shapes(shapes))
    source = full_size_folder(
        tmp_path, VICUNA, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-1, mm_vision_resolution=pixels
    )
    target = convllava.prepare(source, from_checkpoint=True)
    expected = check_names(target)
    assert len(expected) == len(target.origins) == 695 and not target.made and not target.left_out
    config = target.config
    assert (config.image_seq_length, config.image_token_id, config.text_config.vocab_size) == (tokens, 32000, 32064)
    assert (config.vision_config.depths, config.vision_config.hidden_size) == (depths, 3072)
    assert target.processor.patch_size == 64 and target.processor.image_processor.size.shortest_edge == pixels


def test_full_size_convllava_of_four_stages(tmp_path, monkeypatch):
    """As many tokens as AGE-VLM has: 768 pixels in cells of 32. No such language model is published."""
    tower = published.convnext([3, 3, 27, 3], [192, 384, 768, 1536])
    assert parameters(published.shapes_of(ConvNextModel, tower)) == pytest.approx(196.2e6, rel=1e-3)
    shapes = published.system_shapes(published.llama_shapes(**VICUNA), tower)
    monkeypatch.setattr(convllava, "Weights", lambda source: Shapes(shapes))
    source = full_size_folder(
        tmp_path, VICUNA, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-1, mm_vision_resolution=768
    )
    target = convllava.prepare(source, from_checkpoint=True)
    assert len(check_names(target)) == len(shapes)
    assert target.config.image_seq_length == 576 and target.processor.patch_size == 32


@pytest.mark.parametrize(("size", "total"), [("1.7B", 1674.1e6), ("3B", 3.0e9), ("7B", 7.1e9)])
def test_full_size_mobilevlm(size, total, tmp_path, monkeypatch):
    llama = MOBILE_LLAMA[size]
    shapes = published.system_shapes(published.llama_shapes(**llama), CLIP_L)
    assert parameters(shapes) == pytest.approx(total, rel=0.02)
    if size == "1.7B":
        assert len(shapes) == 616 and parameters(shapes) == pytest.approx(total, rel=1e-4)
    rotary = published.llama_shapes(**llama, rotary=True)
    buffers = {name: shape for name, shape in rotary.items() if name.endswith("inv_freq")}
    if size == "7B":
        assert published.index_bytes(shapes | buffers, 2, 2 * parameters(shapes)) == 76_178
    monkeypatch.setattr(mobilevlm, "Weights", lambda source: Shapes(shapes | buffers))
    source = full_size_folder(
        tmp_path, llama, mm_projector_type="ldpnetv2", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        mm_vision_tower="openai/clip-vit-large-patch14-336",
    )  # fmt: skip
    target = mobilevlm.prepare(source)
    expected = check_names(target)
    assert len(expected) == len(target.origins) == len(shapes) and len(target.left_out) == llama["layers"]
    vision = target.config.vision_config
    assert (vision.image_size, vision.num_attention_heads, vision.num_hidden_layers) == (336, 16, 24)
    assert target.config.image_seq_length == 144 and target.processor.patch_size == 28
    projector = sum(shape.numel() for name, shape in expected.items() if "multi_modal_projector" in name)
    assert size != "1.7B" or projector == pytest.approx(6.316e6, rel=1e-3)
