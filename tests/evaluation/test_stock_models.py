"""Any image-text-to-text model: a stock LLaVA is evaluated as ours are, but for the maps that it does not have."""

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from agevlm.data.scenes.build import build_scenes
from agevlm.evaluation.registry import BENCHMARKS
from agevlm.evaluation.run import evaluate_scenes
from agevlm.models import load
from builders import tiny_tokenizer


TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A random LLaVA: CLIP with 4 patches, 2 Llama layers."""
    folder = tmp_path_factory.mktemp("llava") / "llava"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=16, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=32),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), initializer_range=0.5, **special),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    return build_scenes(folder, captions=1, instructions=1, test=4, size=64, progress=False)


def test_a_stock_model_is_evaluated(llava, scenes, tmp_path):
    model, processor = load(llava)
    settings = {"benchmarks": ["pope", "cvbench"], "max_new_tokens": 3, "progress": False}
    metrics = evaluate_scenes(model, processor, scenes, "composition", tmp_path / "a", batch_size=4, **settings)
    assert set(metrics["benchmarks"]) == {"pope", "cvbench"}
    assert metrics["grounding"] == {"n": 0, "skipped": 0, "layers": []}, "it has no maps to measure"
    single = evaluate_scenes(model, processor, scenes, "composition", tmp_path / "b", batch_size=1, **settings)
    assert single["benchmarks"] == metrics["benchmarks"]
    lines = [(tmp_path / name / "pope" / "predictions.jsonl").read_text(encoding="utf-8") for name in "ab"]
    assert lines[0] == lines[1]


def test_a_protocol_of_judges_needs_one(model, processor, scenes, tmp_path):
    assert BENCHMARKS["hallusionbench"]["official"].judged_only
    with pytest.raises(ValueError, match="hallusionbench: the protocol 'official' is scored by a judge alone"):
        evaluate_scenes(
            model, processor, scenes, "composition", tmp_path, benchmarks=["hallusionbench"], protocol="official"
        )
