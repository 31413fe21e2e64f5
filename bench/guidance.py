"""What guidance costs: cross-attention of Llama-1B's dimensions over 576 visual tokens, forward and backward.

Ways to come by the loss of Eq. 3: `eager` keeps all attention weights; `tap` and `mass` are the model's own
(`modeling_agevlm/guidance_agevlm.py`); the ratios are to attention without guidance in the same round, rounds being
interleaved. Times are processor time: set OMP_NUM_THREADS=1. `--step` measures a whole training step of a model.

    python bench/guidance.py [--tokens 512] [--batch 8] [--rounds 5] [--dtype float32]
    python bench/guidance.py --step [--layers 4]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import ConvNextConfig, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

from agevlm.modeling_agevlm import AgeVlmConfig, AgeVlmForConditionalGeneration
from agevlm.modeling_agevlm.guidance_agevlm import Visibility, attend_with_mass, tap
from agevlm.training.losses import guidance_loss, guidance_loss_of_mass


HEADS, GROUPS, WIDTH, CELLS = 32, 8, 64, 576
SCALING = WIDTH**-0.5
MODULE = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=True, is_causal=False)
SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]
CASES = (("1/8 rows, 32 tokens", 1 / 8, 32), ("all rows, 32 tokens", 1.0, 32), ("all rows, all tokens", 1.0, None))


def eager(query, key, value, selected, visibility, mask):
    """All weights kept; their mean over heads and selected tokens is the map."""
    weights = (query @ repeat_kv(key, HEADS // GROUPS).transpose(2, 3) * SCALING).softmax(-1, dtype=torch.float32)
    chosen = selected.float()
    maps = torch.einsum("bhtv,bt->bv", weights, chosen) / (HEADS * chosen.sum(1, keepdim=True)).clamp(min=1)
    return (weights.to(value.dtype) @ repeat_kv(value, HEADS // GROUPS)).transpose(1, 2), guidance_loss(
        maps[None], mask
    )


def plain(query, key, value, selected, visibility, mask):
    return SDPA(MODULE, query, key, value, None, scaling=SCALING, is_causal=False)[0], None


def tapped(query, key, value, selected, visibility, mask):
    query, key, maps = tap(query, key, selected, visibility, SCALING)
    attended, _ = SDPA(MODULE, query, key, value, None, scaling=SCALING, is_causal=False)
    return attended, guidance_loss(maps[None], mask)


def with_mass(query, key, value, selected, visibility, mask):
    attended, _, mass = attend_with_mass(
        SDPA, MODULE, query, key, value, None, selected, mask, visibility, scaling=SCALING, is_causal=False
    )
    return attended, guidance_loss_of_mass(mass[None], mask)


WAYS: dict[str, Callable] = {"none": plain, "eager": eager, "tap": tapped, "mass": with_mass}


def attention_seconds(way: Callable, inputs: list[torch.Tensor], guidance: tuple) -> float:
    inputs = [x.detach().requires_grad_() for x in inputs]
    start = time.process_time()
    attended, loss = way(*inputs, *guidance)
    total = attended.float().square().mean()
    if loss is not None:
        total = total + loss.masked_fill(~guidance[0].any(1), 0).sum()
    total.backward()
    return time.process_time() - start


def attention(tokens: int, batch: int, rounds: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(batch, HEADS, tokens, WIDTH), *(torch.randn(batch, GROUPS, CELLS, WIDTH) for _ in "kv")]
    inputs = [x.to(dtype) for x in inputs]
    visibility = Visibility(
        torch.ones(batch, tokens, 1, dtype=torch.bool), torch.ones(batch, 1, CELLS, dtype=torch.bool)
    )
    mask = torch.rand(batch, CELLS) < 0.15
    for title, share, count in CASES:
        selected = torch.zeros(batch, tokens, dtype=torch.bool)
        selected[: max(1, round(share * batch)), : count or tokens] = True
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(rounds + 1):
            for name, way in WAYS.items():
                seconds[name].append(attention_seconds(way, inputs, (selected, visibility, mask)))
        ratios = {
            name: statistics.median(a / b for a, b in zip(values[1:], seconds["none"][1:], strict=True))
            for name, values in seconds.items()
        }
        print(f"| {title} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios.values()) + " |", flush=True)


def training_step(layers: int, rounds: int, dtype: torch.dtype) -> None:
    """One row of 512 tokens and a picture of 768 pixels through a model of Llama-1B's widths; the language model and
    the tower are frozen, as in stage 1 and 3, so that guidance is as large a part of the step as it gets."""
    torch.manual_seed(0)
    config = AgeVlmConfig(
        text_config=LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=HEADS,
            num_key_value_heads=GROUPS, head_dim=WIDTH, vocab_size=1024, tie_word_embeddings=True,
        ),
        vision_config=ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]),
        cross_attention_layers=[layers // 2],
        image_token_id=5,
    )  # fmt: skip
    model = AgeVlmForConditionalGeneration(config).to(dtype).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("cross_attention_layers" in name or "projector" in name)
    ids = torch.randint(10, 1000, (1, 512))
    ids[:, 0] = 5
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 768, 768), "labels": ids}
    query = torch.ones(1, 512, dtype=torch.bool)
    few = query & (torch.arange(512) < 32)
    mask = torch.rand(1, CELLS) < 0.15

    def seconds(**guidance) -> float:
        start = time.process_time()
        output = model(**batch, use_cache=False, **guidance)
        loss = output.loss
        if output.cross_attention_maps is not None:
            loss = loss + guidance_loss(output.cross_attention_maps, mask).mean()
        if output.cross_attention_mass is not None:
            loss = loss + guidance_loss_of_mass(output.cross_attention_mass, mask).mean()
        loss.backward()
        return time.process_time() - start

    ways = {
        "none": {},
        "tap, 32 tokens": {"guidance_query_mask": few},
        "tap, all tokens": {"guidance_query_mask": query},
        "mass, all tokens": {"guidance_query_mask": query, "guidance_mask": mask},
    }
    times = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, guidance in ways.items():
            times[name].append(seconds(**guidance))
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values[1:], times["none"][1:], strict=True))
        print(f"| {name} | {ratio:.3f} | {statistics.median(values[1:]):.2f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="text layers of the model of --step")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--step", action="store_true", help="a whole training step instead of the attention alone")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {options}")
    if options.step:
        print("| guidance | ratio | median |\n|---|---|---|")
        training_step(options.layers, options.rounds, dtype)
    else:
        print("| guided | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
        attention(options.tokens, options.batch, options.rounds, dtype)


if __name__ == "__main__":
    main()
