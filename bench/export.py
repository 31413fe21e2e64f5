"""What exporting costs and brings on a CPU: eager torch, ONNX Runtime, and ONNX Runtime with int8 weights.

Two questions, two models:
- Does int8 answer alike? `--checkpoint` is asked about scenes it has not seen; counted are first tokens and whole
  answers equal to eager torch's, and how far apart the first token's distributions are.
- How small and how fast? A model of SmolLM2-135M's dimensions with a ConvNeXt-T at 384 px (144 visual tokens) and
  random weights. Seconds of the first token (tower included) and per decoded token through `generate`, every way once
  per round; ratios to eager torch are medians of the rounds' ratios.

    python bench/export.py [--questions 60] [--rounds 7] [--steps 16] [--processor-time]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers
from transformers import ConvNextConfig, LlamaConfig

from agevlm.conversion.assemble import spread_cross_attention_layers
from agevlm.data.scenes.builder import SceneArguments, SceneBuilder
from agevlm.images import open_image
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor
from agevlm.serving.exported import ExportedAgeVlm, export


GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def exports(model: AgeVlmForConditionalGeneration, image_size: int, folder: Path) -> dict[str, Any]:
    """The model and its two exports, read back from disk; prints what they weigh."""
    ways: dict[str, Any] = {"torch": model}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(f"| torch, float32 weights | {weights / 1e6:.1f} MB | 1.00 |")
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    for name, int8 in (("onnx", False), ("onnx int8", True)):
        out = folder / name.replace(" ", "-")
        export(model, image_size, int8=int8).save_pretrained(out)
        size = sum(path.stat().st_size for path in out.glob("*.onnx*"))
        print(f"| {name}, graphs and weights on disk | {size / 1e6:.1f} MB | {size / weights:.2f} |", flush=True)
        ways[name] = ExportedAgeVlm.from_pretrained(out, session_options=session_options)
    return ways


def agreement(checkpoint: Path, questions: int, folder: Path) -> None:
    """Rows of answers that are the eager model's."""
    model = AgeVlmForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AgeVlmProcessor.from_pretrained(checkpoint)
    size = processor.image_processor.size["height"]
    ways = exports(model, size, folder)
    builder = SceneBuilder(SceneArguments(size=size, seed=1))
    outputs: dict[str, list] = {name: [] for name in ways}
    for index in range(questions):
        row, *_ = builder.instruction_row(index)
        image = open_image(row["images"][0], row["id"])
        text = processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
        inputs = processor(images=[image], text=text, return_tensors="pt")
        for name, way in ways.items():
            outputs[name].append(way.generate(**inputs, max_new_tokens=16, **GREEDY))
    print("\n| way | first token | whole answer | median and largest KL of the first token |\n|---|---|---|---|")
    for name in list(ways)[1:]:
        first, whole, divergence = 0, 0, []
        for given, wanted in zip(outputs[name], outputs["torch"], strict=True):
            whole += torch.equal(given.sequences, wanted.sequences)
            first += int(given.logits[0].argmax() == wanted.logits[0].argmax())
            logits = (given.logits[0].log_softmax(-1), wanted.logits[0].log_softmax(-1))
            divergence.append(float(torch.nn.functional.kl_div(*logits, reduction="sum", log_target=True)))
        print(
            f"| {name} | {first} of {questions} | {whole} of {questions} | {statistics.median(divergence):.1e}, "
            f"{max(divergence):.1e} |"
        )


def speed(rounds: int, steps: int, clock, folder: Path) -> None:
    torch.manual_seed(0)
    config = AgeVlmConfig(
        text_config=LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        ),
        vision_config=ConvNextConfig(depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768], layer_norm_eps=1e-6),
        cross_attention_layers=spread_cross_attention_layers(30),
        image_token_id=5,
    )  # fmt: skip
    model = AgeVlmForConditionalGeneration(config).eval()
    ways = exports(model, 384, folder)
    ids = torch.randint(10, 49000, (1, 64))
    ids[:, 0] = 5
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 384, 384)}

    def seconds(way: Any, tokens: int) -> float:
        start = clock()
        way.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return clock() - start

    first: dict[str, list[float]] = {name: [] for name in ways}
    step: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name, way in ways.items():
            one, many = seconds(way, 1), seconds(way, steps + 1)
            if index:  # the first round warms up
                first[name].append(one)
                step[name].append((many - one) / steps)
    print("\n| way | first token | ratio | per decoded token | ratio |\n|---|---|---|---|---|")
    for name in ways:
        ratios = [
            statistics.median(a / b for a, b in zip(times[name], times["torch"], strict=True))
            for times in (first, step)
        ]
        print(
            f"| {name} | {statistics.median(first[name]):.3f} s | {ratios[0]:.2f} | "
            f"{1000 * statistics.median(step[name]):.1f} ms | {ratios[1]:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/agevlm-tiny"))
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="decode steps per round")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time instead of the wall's, for one thread on a machine that does other work",
    )
    options = parser.parse_args()
    if options.processor_time and torch.get_num_threads() > 1:
        parser.error("--processor-time adds up the time of all threads: set OMP_NUM_THREADS=1")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{torch.get_num_threads()} threads, {options}"
    )
    with tempfile.TemporaryDirectory() as folder:
        print(f"\n{options.checkpoint}\n")
        agreement(options.checkpoint, options.questions, Path(folder) / "checkpoint")
        print("\nSmolLM2-135M's dimensions, random weights\n")
        speed(
            options.rounds,
            options.steps,
            time.process_time if options.processor_time else time.perf_counter,
            Path(folder) / "small",
        )


if __name__ == "__main__":
    main()
