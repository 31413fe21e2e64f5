"""Image processing against the stock processors of CLIP and LLaVA, at the same canvas and on the same pictures.

CLIP resizes the shorter side and crops the centre (our `crop`); LLaVA pads to a square (our `pad`). Rounds are
interleaved and each compares with the stock processor of the same backend in the same round; below 1, ours is faster.
The pictures are decoded already: smooth, with some noise.

    python bench/image_processing.py [--size 768] [--batch 8] [--rounds 15] [--threads 1]
"""

import argparse
import platform
import statistics
import time

import numpy as np
import PIL
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil
from transformers.utils import is_torchvision_available

from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessor, AgeVlmImageProcessorPil


PICTURES = ((640, 480), (500, 1333), (1500, 1000), (3000, 2000))


def photograph(width: int, height: int, seed: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 90 + seed), np.cos(y / 70), np.sin((x + y) / 110)], axis=-1) * 90 + 120
    noise = np.random.default_rng(seed).normal(0, 8, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def pairs(size: int) -> dict[str, tuple]:
    """What is compared -> (ours, stock)."""
    canvas = {"height": size, "width": size}
    crop = {"size": {"shortest_edge": size}, "crop_size": canvas}
    pad = {**crop, "do_pad": True}
    compared = {
        "crop : CLIP, Pillow": (
            AgeVlmImageProcessorPil(size=canvas, geometry="crop"),
            CLIPImageProcessorPil(**crop),
        ),
        "pad : LLaVA, Pillow": (AgeVlmImageProcessorPil(size=canvas, geometry="pad"), LlavaImageProcessorPil(**pad)),
    }
    if is_torchvision_available():
        from transformers import CLIPImageProcessor, LlavaImageProcessor

        compared["crop : CLIP, torchvision"] = (
            AgeVlmImageProcessor(size=canvas, geometry="crop"),
            CLIPImageProcessor(**crop),
        )
        compared["pad : LLaVA, torchvision"] = (
            AgeVlmImageProcessor(size=canvas, geometry="pad"),
            LlavaImageProcessor(**pad),
        )
    return compared


def seconds(processor, images: list[Image.Image]) -> float:
    start = time.perf_counter()
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    elapsed = time.perf_counter() - start
    assert pixels.shape[0] == len(images) and pixels.dtype == torch.float32
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torchvision = "none"
    if is_torchvision_available():
        import torchvision as module

        torchvision = module.__version__
    print(f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, torchvision {torchvision}, ")
    print(
        f"Pillow {PIL.__version__}; batch {options.batch}, canvas {options.size}, median of {options.rounds} rounds\n"
    )
    compared = pairs(options.size)
    print("| pictures | " + " | ".join(f"{name} | ms" for name in compared) + " |")
    print("|---|" + "---|---|" * len(compared))
    for width, height in PICTURES:
        images = [photograph(width, height, seed) for seed in range(options.batch)]
        ours: dict[str, list[float]] = {name: [] for name in compared}
        ratios: dict[str, list[float]] = {name: [] for name in compared}
        for warm in range(options.rounds + 1):
            for name, (our, stock) in compared.items():
                # Ours first in every other round, so that neither always finds the caches warm.
                order = (our, stock) if warm % 2 else (stock, our)
                taken = {processor: seconds(processor, images) for processor in order}
                if warm:
                    ours[name].append(taken[our] / len(images) * 1000)
                    ratios[name].append(taken[our] / taken[stock])
        cells = " | ".join(f"{statistics.median(ratios[n]):.2f} | {statistics.median(ours[n]):.1f}" for n in compared)
        print(f"| {width} x {height} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
