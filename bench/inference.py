"""Time to the first token, decode rate and cache of AGE-VLM beside a concatenating twin and beside Mllama.

All three have Llama-3.2-1B's dimensions and random weights in bfloat16; the first two also share the tower (ConvNeXt-L
at 768 px, 576 visual tokens):
- `agevlm`: the paper's configuration, cross blocks at 2, 7, 12 and 17.
- `concat`: transformers' FastVlm, the LLaVA class that takes a ConvNeXt: same tower, projector and Llama, the visual
  tokens stand in the text.
- `mllama`: transformers' Mllama with as many cross layers at the same places. Its own tower is another architecture,
  so it is given the visual tokens, and only what comes after vision is compared.

A round runs every model once, one after the other, so that a machine's other load meets all of them; ratios are
medians of the rounds' ratios. Each call gets the masks that `generate` would pass. "Share of GEMM peak" is operations
counted by torch's flop counter over time, by the best rate that a matrix product of the same round reached; "share of
read rate" is the weights that a decode step reads over time, by the rate of a bare matrix-vector product.

"Packed decode": unless there is a mask, transformers gives torch's CPU kernel one query head at a time, which reads a
cache once per query head and not once per group. Our cross blocks avoid that; these rows spare all models it in all
layers, which helps the longest cache most.

    python bench/inference.py                      # Llama-1B's dimensions: 12 GB of memory, some 15 minutes on 2 cores
    python bench/inference.py --size small         # a look at the script: seconds
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import transformers.integrations.sdpa_attention as sdpa
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Cache,
    ConvNextConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPooling

from agevlm.conversion.fast_vlm import fast_vlm_config
from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration


CLOCK = time.perf_counter
IMAGE_TOKEN = 5
CROSS_LAYERS = [2, 7, 12, 17]
SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "text": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "vocab_size": 128256},
        "vision": {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536]},
        "pixels": 768,
    },
    "small": {
        "text": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 2048},
        "vision": {"depths": [1, 1, 3, 1], "hidden_sizes": [24, 48, 96, 192]},
        "pixels": 256,
    },
}


@dataclass
class Contestant:
    """One model, ready to be timed.

    Attributes:
        prefill: visual tokens `(B, L, D)`, or None to run the tower on the picture -> logits of the last token and
            the filled cache.
        step: token `(B, 1)`, cache and number of tokens in it -> logits and the cache.
        decoder: modules whose weights a decode step reads in full.
    """

    model: PreTrainedModel
    prefill: Callable[[torch.Tensor | None], Any]
    step: Callable[[torch.Tensor, Cache, int], Any]
    decoder: tuple[nn.Module, ...]


def _as_dense(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def build(model_class: type[PreTrainedModel], config, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made in its dtype: float32 first would need twice the memory."""
    with no_init_weights():
        # a copy: the models would write their attention kernel into a configuration they share
        model = model_class._from_config(copy.deepcopy(config), dtype=dtype).eval()
    # Given the last token as a slice, torch copies the head's weights before it multiplies (in bfloat16 on a CPU,
    # seconds). Our model avoids that; here the others are spared it too, so that it decides no comparison.
    model.lm_head.register_forward_pre_hook(_as_dense)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            elif name.endswith("bias"):
                parameter.zero_()
            else:  # norms, LayerScale and Mllama's gates: of a size that leaves no branch unused
                parameter.fill_(0.5)
    model.tie_weights()
    return model


def fixed_features(model: nn.Module, features: torch.Tensor | None) -> None:
    """Let a model take `features` for what its tower would have returned; None gives it its tower back."""
    if features is None:
        model.__dict__.pop("get_image_features", None)
    else:
        given = BaseModelOutputWithPooling(pooler_output=features)
        model.__dict__["get_image_features"] = lambda *args, **kwargs: given


def contestants(size: dict, tokens: int, batch: int, dtype: torch.dtype) -> dict[str, Contestant]:
    heads = {"num_key_value_heads": size["text"]["num_attention_heads"] // 4, "rms_norm_eps": 1e-5}
    text_config = LlamaConfig(
        **size["text"], **heads, num_hidden_layers=16, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    vision_config = ConvNextConfig(**size["vision"], layer_norm_eps=1e-6)
    cells = (size["pixels"] // 32) ** 2
    pixels = torch.randn(batch, 3, size["pixels"], size["pixels"]).to(dtype)
    ids = torch.randint(10, size["text"]["vocab_size"] - 10, (batch, tokens))
    ids[:, 0] = IMAGE_TOKEN

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=torch.bool)

    ours = build(
        AgeVlmForConditionalGeneration,
        AgeVlmConfig(
            text_config=text_config, vision_config=vision_config, cross_attention_layers=CROSS_LAYERS,
            image_token_id=IMAGE_TOKEN,
        ),
        dtype,
    )  # fmt: skip
    # what the processor returns and `generate` passes at every step
    masks = {
        "image_mask": ones(batch, 1),
        "visual_token_mask": ones(batch, 1, cells),
        "cross_attention_mask": ones(batch, tokens, 1),
    }

    def our_prefill(features):
        fixed_features(ours.model, features)
        return ours(input_ids=ids, pixel_values=pixels, attention_mask=ones(batch, tokens), logits_to_keep=1,
                    use_cache=True, **masks)  # fmt: skip

    def our_step(token, cache, length):
        return ours(input_ids=token, attention_mask=ones(batch, length + 1), cache=cache, use_cache=True,
                    **masks)  # fmt: skip

    twin = build(
        FastVlmForConditionalGeneration,
        fast_vlm_config(vision_config, text_config, IMAGE_TOKEN, size["pixels"]),
        dtype,
    )
    long_ids = torch.cat([torch.full((batch, cells), IMAGE_TOKEN), ids[:, 1:], ids[:, -1:]], dim=1)

    def twin_prefill(features):
        fixed_features(twin.model, features)
        return twin(input_ids=long_ids, pixel_values=pixels, attention_mask=ones(*long_ids.shape), logits_to_keep=1,
                    use_cache=True)  # fmt: skip

    def twin_step(token, cache, length):
        return twin(input_ids=token, attention_mask=ones(batch, length + 1), cache=cache, use_cache=True)

    mllama = build(
        MllamaForConditionalGeneration,
        MllamaConfig(
            text_config={
                **size["text"], **heads, "num_hidden_layers": 20, "cross_attention_layers": CROSS_LAYERS,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            },
            # never run; as small as the class allows
            vision_config={
                "hidden_size": 32, "attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64, "image_size": 28,
            },
            image_token_index=IMAGE_TOKEN,
        ),
        dtype,
    )  # fmt: skip
    mllama.model.vision_model.num_patches = cells  # what it spreads its masks to: cells per tile

    def mllama_prefill(features):
        return mllama(
            input_ids=ids, cross_attention_states=features, attention_mask=ones(batch, tokens), logits_to_keep=1,
            cross_attention_mask=ones(batch, tokens, 1, 1).long(), use_cache=True,
        )  # fmt: skip

    def mllama_step(token, cache, length):
        return mllama(input_ids=token, attention_mask=ones(batch, length + 1), cache=cache, use_cache=True,
                      cross_attention_mask=ones(batch, 1, 1, 1).long())  # fmt: skip

    return {
        "agevlm": Contestant(
            ours, our_prefill, our_step,
            (ours.model.language_model.layers, ours.model.language_model.cross_attention_layers, ours.lm_head),
        ),
        "concat": Contestant(twin, twin_prefill, twin_step, (twin.model.language_model.layers, twin.lm_head)),
        "mllama": Contestant(
            mllama, mllama_prefill, mllama_step, (mllama.model.language_model.layers, mllama.lm_head),
        ),
    }  # fmt: skip


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = CLOCK()
    result = call()
    return CLOCK() - start, result


def operations(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def cache_bytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def decode(contestant: Contestant, output: Any, steps: int) -> float:
    """Seconds per token after a prefill, the first step left out."""
    length = max(layer.keys.shape[2] for layer in output.cache.layers[:1])
    seconds = []
    for _ in range(steps + 1):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        taken, output = timed(lambda: contestant.step(token, output.cache, length))  # noqa: B023
        seconds.append(taken)
        length += 1
    return statistics.median(seconds[1:])


@contextmanager
def packed_heads() -> Iterator[None]:
    """All query heads of a group in one read of the cache, mask or no mask."""
    decides = sdpa.use_gqa_in_sdpa
    sdpa.use_gqa_in_sdpa = lambda *args: False
    try:
        yield
    finally:
        sdpa.use_gqa_in_sdpa = decides


def machine_rates(dtype: torch.dtype, batch: int) -> tuple[float, float]:
    """The machine at this moment: operations per second of a large matrix product, bytes per second of the weights
    that a product with `batch` vectors reads (a matrix of 0.5 GB, larger than any cache)."""
    rates = []
    for rows in (640, 2048):
        a, b = torch.randn(rows, 2048).to(dtype), torch.randn(8192, 2048).to(dtype)
        rates += [2 * rows * 2048 * 8192 / timed(lambda: nn.functional.linear(a, b))[0] for _ in range(3)]  # noqa: B023
    vectors, matrix = torch.randn(batch, 2048).to(dtype), torch.empty(128256, 2048, dtype=dtype).fill_(0.5)
    reads = [matrix.nbytes / timed(lambda: nn.functional.linear(vectors, matrix))[0] for _ in range(4)]
    return max(rates), max(reads)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="paper")
    parser.add_argument("--tokens", type=int, default=64, help="text tokens of the prompt, the placeholder included")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="decode steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor's time instead of the wall's, for one thread on a machine that does other work",
    )
    options = parser.parse_args()
    if options.processor_time:
        if torch.get_num_threads() > 1:
            parser.error("--processor-time adds up the time of all threads: set OMP_NUM_THREADS=1")
        global CLOCK
        CLOCK = time.process_time
    size, dtype = SIZES[options.size], getattr(torch, options.dtype)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, {options}",
        flush=True,
    )
    models = contestants(size, options.tokens, options.batch, dtype)
    for name, contestant in models.items():
        parameters = sum(p.numel() for p in contestant.model.parameters())
        print(f"{name}: {parameters / 1e9:.3f} B parameters", flush=True)

    cells = (size["pixels"] // 32) ** 2
    features = torch.randn(options.batch, cells, size["text"]["hidden_size"]).to(dtype)
    with_tower = ("agevlm", "concat")
    rows: dict[str, tuple[Contestant, torch.Tensor | None]] = {}
    rows |= {f"with vision, {name}": (models[name], None) for name in with_tower}
    rows |= {f"without vision, {name}": (contestant, features) for name, contestant in models.items()}
    # The uncounted round: warms up, counts operations, reads off the caches.
    flops, caches = {}, {}
    for title, (contestant, given) in rows.items():
        flops[title] = operations(lambda: contestant.prefill(given))  # noqa: B023
        caches[title.split(", ")[1]] = cache_bytes(contestant.prefill(given).cache)
        print(f"warm: {title}, {flops[title] / 1e12:.3f} T operations", flush=True)
    weights = {
        name: sum(p.nbytes for module in contestant.decoder for p in module.parameters())
        for name, contestant in models.items()
    }

    seconds: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}

    def record(title: str, taken: float, share: float) -> None:
        seconds.setdefault(title, []).append(taken)
        shares.setdefault(title, []).append(share)

    peaks = []
    for index in range(options.rounds):
        peak, read_rate = machine_rates(dtype, options.batch)
        peaks.append((peak, read_rate))
        outputs = {}
        for title, (contestant, given) in rows.items():
            taken, outputs[title] = timed(lambda: contestant.prefill(given))  # noqa: B023
            record(f"first token, {title}", taken, flops[title] / taken / peak)
        for name, contestant in models.items():
            taken = decode(contestant, outputs[f"without vision, {name}"], options.steps)
            record(f"decode, {name}", taken, weights[name] / taken / read_rate)
        for name, contestant in models.items():
            with packed_heads():
                taken = decode(contestant, outputs[f"without vision, {name}"], options.steps)
            record(f"packed decode, {name}", taken, weights[name] / taken / read_rate)
        print(f"round {index + 1}: " + ", ".join(f"{t}: {v[-1]:.3f} s" for t, v in seconds.items()), flush=True)

    gemm, read = (statistics.median(values) for values in zip(*peaks, strict=True))
    print(f"\nGEMM peak {gemm / 1e9:.0f} GFLOP/s, read rate {read / 1e9:.1f} GB/s (medians over rounds)\n")
    print("| | seconds | ratio agevlm : this | share of GEMM peak (decode: of read rate) |\n|---|---|---|---|")
    for title, values in seconds.items():
        kind = title.rsplit(", ", 1)[0]
        ratio = statistics.median(a / b for a, b in zip(seconds[f"{kind}, agevlm"], values, strict=True))
        share = statistics.median(shares[title])
        print(f"| {title} | {statistics.median(values):.3f} | {ratio:.3f} | {share:.2f} |")
    for name, value in caches.items():
        print(f"| cache, {name} | {value / 1e6:.2f} MB | {caches['agevlm'] / value:.3f} | |")


if __name__ == "__main__":
    main()
