"""The way from shards to batches: rows per second beside a plain TRL + `datasets` script, memory, and going on late.

    python bench/input_pipeline.py throughput [--rows 192] [--rounds 5] [--workers 0 1 2]
    python bench/input_pipeline.py memory [--rows 200000]
    python bench/input_pipeline.py resume [--rows 9100000]

`throughput`: JPEGs of four sizes, a quarter of the rows with a mask, batches of 16 on a canvas of 768 pixels. The
plain script decodes with `datasets`, makes batches with TRL's own vision collator and LLaVA's stock image processor
(Pillow; as many image tokens as ours: one), and shrinks masks to the grid with Pillow. Rounds of both alternate. Ours
arrives as bytes, as in training, where the device normalizes; `normalized` does that here too, on the CPU.
"""

import argparse
import functools
import io
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset, Features
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from agevlm.data.rows import GUIDANCE, ROW_FEATURES
from agevlm.processing.build import build_processor
from agevlm.training.collator import AgeVlmDataCollator
from agevlm.training.sampling import OrderSampler
from agevlm.training.streaming import open_shards


SIZES = ((640, 480), (500, 667), (1024, 768), (1500, 1000))
BATCH, CANVAS, GRID = 16, 768, 24
QUESTION = "What is in the image?"
ANSWER = "A blue car and a green tree stand on the left of a yellow house, behind a fence. " * 3
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>"]
RESERVED = [f"<|reserved_special_token_{index}|>" for index in range(2)]
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>"
    "{% if message.content is not string %}{% set content %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endset %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ content }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ content }}<|eot_id|>{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(
        [QUESTION, ANSWER],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[*SPECIAL, *RESERVED, "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )


def encoded(image: Image.Image, kind: str, **options) -> dict:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Smooth, with some noise: about as many bytes as a photograph of that size."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 90 + seed), np.cos(y / 70), np.sin((x + y) / 110)], axis=-1) * 90 + 120
    noise = np.random.default_rng(seed).normal(0, 8, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def make_rows(count: int, sizes=SIZES, pictures: int = 32) -> list[dict]:
    """`count` rows that take turns with a few pictures; every fourth has a mask."""
    shown = []
    for seed in range(pictures):
        width, height = sizes[seed % len(sizes)]
        marked = Image.new("1", (width, height))
        marked.paste(1, (width // 4, height // 4, width // 2, height // 2))
        shown.append((encoded(photograph(width, height, seed), "JPEG", quality=90), encoded(marked, "PNG")))
    rows = []
    for index in range(count):
        image, mask = shown[index % pictures]
        guidance = {"query": "blue car", "message_index": 1, "mask": mask, "source": "bench", "score": 1.0}
        messages = [
            {"role": "user", "content": f"<|image|>{QUESTION}"},
            {"role": "assistant", "content": ANSWER},
        ]
        guided = index // 4 % 4 == 0
        rows.append(
            {
                "id": f"row-{index}",
                "images": [image],
                "messages": messages,
                "guidance": guidance if guided else None,
            }
        )
    return rows


def write(rows: list[dict], path: Path, group_rows: int) -> str:
    """Rows as one shard."""
    features = Features({**ROW_FEATURES, "guidance": GUIDANCE})
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path, row_group_size=group_rows)
    return str(path)


class PlainCollator:
    """What a plain script would do with rows whose pictures `datasets` has decoded."""

    def __init__(self):
        size = {"size": {"shortest_edge": CANVAS}, "crop_size": {"height": CANVAS, "width": CANVAS}, "do_pad": True}
        self.collator = DataCollatorForVisionLanguageModeling(
            LlavaProcessor(
                image_processor=LlavaImageProcessorPil(**size),
                tokenizer=tokenizer(),
                patch_size=CANVAS,
                vision_feature_select_strategy="full",
                chat_template=PLAIN_TEMPLATE,
            ),
            assistant_only_loss=True,
        )

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(
            [
                {
                    "images": row["images"],
                    "messages": [
                        {**message, "content": message["content"].removeprefix("<|image|>")}
                        for message in row["messages"]
                    ],
                }
                for row in rows
            ]
        )
        masks = np.zeros((len(rows), GRID, GRID), dtype=np.float32)
        for place, row in enumerate(rows):
            if row["guidance"] is not None:
                mask = row["guidance"]["mask"].convert("L")
                side = max(mask.size)
                square = Image.new("L", (side, side))
                square.paste(mask, ((side - mask.width) // 2, (side - mask.height) // 2))
                masks[place] = np.asarray(square.resize((GRID, GRID), Image.Resampling.BOX)) >= 128
        return {**batch, "masks": torch.from_numpy(masks)}


def processor_seconds() -> float:
    """Of this process and of those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def run(loader: DataLoader, finish: Callable[[dict], object]) -> tuple[float, float]:
    """(seconds, seconds of processors) of one epoch."""
    start, used = time.perf_counter(), processor_seconds()
    iterator = iter(loader)
    for batch in iterator:
        finish(batch)
    del iterator  # ends the workers, whose time counts from then on
    return time.perf_counter() - start, processor_seconds() - used


def throughput(arguments: argparse.Namespace, folder: Path) -> None:
    path = write(make_rows(arguments.rows), folder / "rows.parquet", group_rows=64)
    collator = AgeVlmDataCollator(build_processor(tokenizer(), image_size=CANVAS), pixels_as_bytes=True)
    ours = open_shards([path])
    order = OrderSampler(ours, seed=0)
    plain = Dataset.from_parquet(path, cache_dir=str(folder / "cache"))
    print("| workers | ours, rows/s | normalized too | plain TRL | ratio | ratio of processor time |")
    print("|---|---|---|---|---|---|")
    for workers in arguments.workers:
        loader = functools.partial(DataLoader, batch_size=BATCH, num_workers=workers)
        candidates = {
            "ours": (loader(ours, collate_fn=collator, sampler=order), lambda batch: None),
            "normalized": (
                loader(ours, collate_fn=collator, sampler=order),
                lambda batch: collator.normalized(batch["pixel_values"]),
            ),
            "plain": (loader(plain, collate_fn=PlainCollator(), shuffle=True), lambda batch: None),
        }
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
        for round_ in range(arguments.rounds + 1):
            for name, (data, finish) in candidates.items():
                figure = run(data, finish)
                if round_:  # the first warms up
                    figures[name].append(figure)
        rate = {name: arguments.rows / statistics.median(f[0] for f in of) for name, of in figures.items()}
        ratios = [
            statistics.median(p[kind] / o[kind] for o, p in zip(figures["ours"], figures["plain"], strict=True))
            for kind in (0, 1)
        ]
        print(
            f"| {workers} | {rate['ours']:.1f} | {rate['normalized']:.1f} | {rate['plain']:.1f} | {ratios[0]:.2f} | "
            f"{ratios[1]:.2f} |",
            flush=True,
        )


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    files = []
    per_shard = 20_000
    for start in range(0, arguments.rows, per_shard):
        rows = make_rows(min(per_shard, arguments.rows - start), sizes=((48, 32), (32, 48)))
        files.append(write(rows, folder / f"rows-{start}.parquet", group_rows=100))
    collator = AgeVlmDataCollator(build_processor(tokenizer(), image_size=64), pixels_as_bytes=True)
    data = open_shards(files)
    loader = DataLoader(data, batch_size=BATCH, sampler=OrderSampler(data, seed=0), collate_fn=collator, num_workers=1)
    me, seen, every = psutil.Process(), 0, max(1, arguments.rows // 10)
    print("| rows | this process, MiB | worker, MiB |\n|---|---|---|")
    for batch in loader:
        before, seen = seen, seen + len(batch["input_ids"])
        if seen // every > before // every:
            sizes = [process.memory_info().rss / 2**20 for process in (me, *me.children())]
            print(f"| {seen} | " + " | ".join(f"{size:.0f}" for size in sizes) + " |", flush=True)


def resume(arguments: argparse.Namespace, folder: Path) -> None:
    per_shard = 100_000
    rows = [
        {
            "id": f"row-{index}",
            "images": [],
            "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": f"{index}"}],
        }
        for index in range(per_shard)
    ]
    first = folder / "rows-0.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_FEATURES.arrow_schema), first, row_group_size=100)
    files = [str(first)]
    for shard in range(1, arguments.rows // per_shard):
        (folder / f"rows-{shard}.parquet").hardlink_to(first)
        files.append(str(folder / f"rows-{shard}.parquet"))
    print("| go on at row | open the shards, s | first batch, s | processor time of both, s |\n|---|---|---|---|")
    for row in (0, 100_000, 1_000_000, 9_000_000):
        if row >= arguments.rows:
            continue
        start, used = time.perf_counter(), processor_seconds()
        data = open_shards(files)
        opened = time.perf_counter()
        loader = DataLoader(data, batch_size=BATCH, sampler=OrderSampler(data, seed=0), collate_fn=lambda rows: rows)
        loader = prepare_data_loader(loader, num_processes=8, process_index=0, put_on_device=False)
        if row:
            loader = skip_first_batches(loader, row // BATCH // 8)
        next(iter(loader))
        seconds = opened - start, time.perf_counter() - opened, processor_seconds() - used
        print(f"| {row:,} | " + " | ".join(f"{value:.1f}" for value in seconds) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "memory", "resume"])
    parser.add_argument("--rows", type=int, help="default: 192, 200,000 or 9,100,000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    defaults = {"throughput": (192, throughput), "memory": (200_000, memory), "resume": (9_100_000, resume)}
    rows, measure = defaults[arguments.what]
    arguments.rows = arguments.rows or rows
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
