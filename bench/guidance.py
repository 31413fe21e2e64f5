"""What guidance costs: cross-attention of Llama-1B's dimensions over 576 visual tokens, forward and backward.

Ways to come by the loss of Eq. 3: `eager` keeps all attention weights; `tap` and `mass` are the model's own
(`modeling_agevlm/guidance_agevlm.py`), for one mask and for 8 phrases: `divided`, each phrase has an eighth of the
selected tokens, or `shared`, each has all of them. Ratios are to attention without guidance and, for phrases, to one
mask in the same way, both in the same round, rounds being interleaved. Times are processor time: set
OMP_NUM_THREADS=1. `--step` measures a whole training step of a model.

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
PHRASES = 8
CASES = (("1/8 rows, 32 tokens", 1 / 8, 32), ("all rows, 32 tokens", 1.0, 32), ("all rows, all tokens", 1.0, None))


def eager(query, key, value, selected, visibility, mask):
    """All weights kept; their mean over heads and selected tokens is the map."""
    weights = (query @ repeat_kv(key, HEADS // GROUPS).transpose(2, 3) * SCALING).softmax(-1, dtype=torch.float32)
    chosen = selected.float()
    maps = torch.einsum("bhtv,bpt->bpv", weights, chosen) / (HEADS * chosen.sum(2, keepdim=True)).clamp(min=1)
    attended = (weights.to(value.dtype) @ repeat_kv(value, HEADS // GROUPS)).transpose(1, 2)
    return attended, guidance_loss(maps.flatten(0, 1)[None], mask.flatten(0, 1))


def plain(query, key, value, selected, visibility, mask):
    return SDPA(MODULE, query, key, value, None, scaling=SCALING, is_causal=False)[0], None


def tapped(query, key, value, selected, visibility, mask):
    query, key, maps = tap(query, key, selected, visibility, SCALING)
    attended, _ = SDPA(MODULE, query, key, value, None, scaling=SCALING, is_causal=False)
    return attended, guidance_loss(maps.flatten(0, 1)[None], mask.flatten(0, 1))


def with_mass(query, key, value, selected, visibility, mask):
    attended, _, mass = attend_with_mass(
        SDPA, MODULE, query, key, value, None, selected, mask, visibility, scaling=SCALING, is_causal=False
    )
    return attended, guidance_loss_of_mass(mass.flatten()[None], mask.flatten(0, 1))


def by_phrase(selected_BT: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, phrases, text) and random masks (batch, phrases, cells), bool: of one phrase, or of 8 that divide
    or share the tokens."""
    selected_BPT = selected_BT[:, None].repeat(1, PHRASES if how else 1, 1)
    if how == "divided":
        phrase_BT = (selected_BT.cumsum(1) - 1) * PHRASES // selected_BT.sum(1, keepdim=True).clamp(min=1)
        selected_BPT &= phrase_BT[:, None] == torch.arange(PHRASES)[:, None]
    return selected_BPT, torch.rand(*selected_BPT.shape[:2], CELLS) < 0.15


def report(title: str, times: dict[tuple[str, str], list[float]]) -> None:
    """Medians over the rounds behind the first one, which warms up."""

    def ratio(way: tuple[str, str], base: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(times[way][1:], times[base][1:], strict=True))

    for way, values in times.items():
        name, how = way
        to_one = f"{ratio(way, (name, '')):.3f}" if how else ""
        row = (title, f"{name}, 8 phrases, {how}" if how else name, f"{ratio(way, ('none', '')):.2f}", to_one)
        print("| " + " | ".join(row) + f" | {statistics.median(values[1:]):.2f} s |", flush=True)


WAYS: dict[str, Callable] = {"none": plain, "eager": eager, "tap": tapped, "mass": with_mass}
MEASURED = [
    ("none", ""),
    ("eager", ""),
    *((name, how) for name in ("tap", "mass") for how in ("", "divided", "shared")),
]


def attention_seconds(way: Callable, inputs: list[torch.Tensor], guidance: tuple) -> float:
    inputs = [x.detach().requires_grad_() for x in inputs]
    start = time.process_time()
    attended, loss = way(*inputs, *guidance)
    total = attended.float().square().mean()
    if loss is not None:
        total = total + loss.masked_fill(~guidance[0].any(-1).flatten(), 0).sum()
    total.backward()
    return time.process_time() - start


def attention(tokens: int, batch: int, rounds: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(batch, HEADS, tokens, WIDTH), *(torch.randn(batch, GROUPS, CELLS, WIDTH) for _ in "kv")]
    inputs = [x.to(dtype) for x in inputs]
    visibility = Visibility(
        torch.ones(batch, tokens, 1, dtype=torch.bool), torch.ones(batch, 1, CELLS, dtype=torch.bool)
    )
    for title, share, count in CASES:
        selected = torch.zeros(batch, tokens, dtype=torch.bool)
        selected[: max(1, round(share * batch)), : count or tokens] = True
        times: dict[tuple[str, str], list[float]] = {way: [] for way in MEASURED}
        for _ in range(rounds + 1):
            for (name, how), seconds in times.items():
                chosen, mask = by_phrase(selected, how)
                seconds.append(attention_seconds(WAYS[name], inputs, (chosen, visibility, mask)))
        report(title, times)


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

    def seconds(name: str, selected: torch.Tensor, mask: torch.Tensor) -> float:
        guidance = {"none": {}, "tap": {"guidance_query_mask": selected}}.get(
            name, {"guidance_query_mask": selected, "guidance_mask": mask}
        )
        start = time.process_time()
        output = model(**batch, use_cache=False, **guidance)
        loss = output.loss
        if name == "tap":
            loss = loss + guidance_loss(output.cross_attention_maps.flatten(1, 2), mask.flatten(0, 1)).mean()
        if name == "mass":
            loss = loss + guidance_loss_of_mass(output.cross_attention_mass.flatten(1), mask.flatten(0, 1)).mean()
        loss.backward()
        return time.process_time() - start

    for count in (32, 512):
        times: dict[tuple[str, str], list[float]] = {way: [] for way in MEASURED if way[0] != "eager"}
        for _ in range(rounds + 1):
            for (name, how), measured in times.items():
                measured.append(seconds(name, *by_phrase(torch.arange(512)[None] < count, how)))
        report(f"{count} tokens", times)


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
    print("| guided | way | to none | to one mask | median |\n|---|---|---|---|---|")
    if options.step:
        training_step(options.layers, options.rounds, dtype)
    else:
        attention(options.tokens, options.batch, options.rounds, dtype)


if __name__ == "__main__":
    main()
