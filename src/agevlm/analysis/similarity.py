"""Do hidden states tell a picture's own text from another's? (paper section 3.1, figure 2)

Every picture goes through the model with its own text and, per seed, with the text of another picture; both times
image and text states of that one pass are compared. The paper gives one cosine per pair and neither the reduction over
tokens nor the reason for hidden states; so here:

- `centroid`: cosine of the mean image state and the mean text state (taken for the paper's own: only means give
  distributions as narrow as its 0.96 to 0.98); `pairwise`: mean cosine over all token pairs; `max`: mean over text
  tokens of the best image token.
- `centred`: `centroid` after subtracting, per modality, the mean over all pairs. States of a language model share a
  large common part, which makes every cosine high and tells nothing.
- `qk_cosine`: cosine of mean query and mean key per head, before rotary positions, mean over heads; `qk_logit`: mean
  scaled logit. This is the space in which attention itself compares.

Layers: `hidden_states[0..L]` of a concatenating model, the last after the final norm (headline). Ours has no image
tokens in the text: the image side is the projected picture ("or their projected representations"), the text side the
residual stream after every layer of the stack, headline after the last cross block. These two meet only through Wq and
Wk, so for ours the Q/K rows are the ones with a meaning of their own.
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

from agevlm.models import load
from agevlm.progress import written
from agevlm.stats import derangement, separation
from agevlm.store import write_json

from .figures import save_histogram, save_layers
from .pairs import LeftOut, Pair, load_pairs
from .resume import ERROR, Parts, Row, failures, measure_parts, measured, save_arrays
from .subjects import Encoded, Subject


HIDDEN = ("centroid", "pairwise", "max", "centred")
QUERY_KEY = ("qk_cosine", "qk_logit")
MEANS = ("image_means", "text_means")
HEADLINE = "centroid"
CHUNK = 64  # pairs in a part that a resumed run does not repeat


def reduce_tokens(image_VD: torch.Tensor, text_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The three reductions of one layer's states to one cosine each."""
    image_VD, text_TD = image_VD.float(), text_TD.float()
    image, text = normalize(image_VD, dim=-1), normalize(text_TD, dim=-1)
    return {
        "centroid": cosine_similarity(image_VD.mean(0), text_TD.mean(0), dim=0),
        "pairwise": image.mean(0) @ text.mean(0),
        "max": (text @ image.T).amax(1).mean(),
    }


def reduce_heads(query_HTD: torch.Tensor, key_GVD: torch.Tensor, scaling: float) -> dict[str, torch.Tensor]:
    """Cosine of mean query and mean key, and mean scaled logit, both averaged over heads."""
    query = query_HTD.float().mean(1)
    key = key_GVD.float().mean(1).repeat_interleave(len(query) // len(key_GVD), 0)
    return {
        "qk_cosine": cosine_similarity(query, key, dim=-1).mean(),
        "qk_logit": (query * key).sum(-1).mean() * scaling,
    }


@contextmanager
def _captured(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, torch.Tensor]]:
    """The (first) output of each module in the next forward pass."""
    outputs: dict[Any, torch.Tensor] = {}

    def keep(name):
        return lambda _, __, output: outputs.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(keep(name)))
        yield outputs


def _projections(subject: Subject) -> dict[tuple[int, str], nn.Module]:
    """The last module before rotary positions that queries and keys of each layer pass."""
    found = {}
    for index, attention in subject.attention.items():
        for side in "qk":
            module = getattr(attention, f"{side}_norm", None) or getattr(attention, f"{side}_proj", None)
            if module is None:
                raise ValueError(
                    f"layer {index} ({type(attention).__name__}) has no `{side}_proj`; its queries and keys cannot be "
                    "told apart"
                )
            found[index, side] = module
    return found


def _heads(states: torch.Tensor, head_dim: int, length: int) -> torch.Tensor:
    """Projections in any of transformers' layouts as `(B, T, heads, head_dim)`."""
    if states.dim() == 4:
        if states.shape[1] == states.shape[2]:
            raise ValueError(f"as many tokens as heads ({length}): their order cannot be told; use a longer text")
        if states.shape[1] != length:
            states = states.transpose(1, 2)
    return states.reshape(states.shape[0], length, -1, head_dim)


def hidden_layers(subject: Subject) -> list[int]:
    """Numbers of the layers that `score_pairs` compares: 0 is the embedding of a concatenating model; ours counts the
    interleaved stack."""
    if subject.concatenates:
        return list(range(len(subject.decoder.layers) + 1))
    return list(range(len(subject.decoder.layers) + len(subject.attention)))


def _stack(subject: Subject) -> list[nn.Module]:
    """Our text layers and cross blocks in the order in which they run."""
    blocks = dict(zip(subject.attention, subject.decoder.cross_attention_layers, strict=True))
    layers = iter(subject.decoder.layers)
    return [blocks[index] if index in blocks else next(layers) for index in hidden_layers(subject)]


@torch.inference_mode()
def score_batch(subject: Subject, encoded: Encoded) -> list[dict[str, Any]]:
    """Per row: scores by name, each float32 `(layers,)`, and `image_means`, `text_means` `(layers, D)`."""
    length = encoded.text_BT.shape[1]
    stack = {} if subject.concatenates else dict(enumerate(_stack(subject)))
    with _captured(_projections(subject)) as projected, _captured(stack) as streams:
        output = subject.model.base_model(
            **encoded.inputs, output_hidden_states=subject.concatenates, use_cache=False, return_dict=True
        )
    rows = []
    attentions: dict[int, Any] = subject.attention
    for row in range(len(encoded.text_BT)):
        words = encoded.text_BT[row]
        if not words.any():
            raise ValueError("a text without any token that is not special; give pairs with words")
        image_BT = encoded.image_BT
        if image_BT is not None:
            texts = [layer[row, words] for layer in output.hidden_states]
            images = [layer[row, image_BT[row]] for layer in output.hidden_states]
        else:
            texts = [streams[index][row, words] for index in sorted(streams)]
            images = [output.image_outputs.pooler_output[row, 0][encoded.inputs["visual_token_mask"][row, 0].bool()]]
        shared = images * len(texts) if len(images) == 1 else images
        scores = [reduce_tokens(image, text) for image, text in zip(shared, texts, strict=True)]
        meetings = []
        for index, attention in attentions.items():
            query, key = projected[index, "q"], projected[index, "k"]
            if image_BT is None:
                seen = encoded.inputs["visual_token_mask"][row].flatten().bool()
                query_HTD, key_GVD = query[row][:, words], key[row][:, seen]  # ours puts heads first
            else:
                width = attention.head_dim
                query_HTD = _heads(query, width, length)[row, words].transpose(0, 1)
                key_GVD = _heads(key, width, length)[row, image_BT[row]].transpose(0, 1)
            meetings.append(reduce_heads(query_HTD, key_GVD, attention.scaling))
        rows.append(
            {name: torch.stack([layer[name] for layer in scores]).cpu().numpy() for name in scores[0]}
            | {name: torch.stack([layer[name] for layer in meetings]).cpu().numpy() for name in QUERY_KEY}
            | {
                "image_means": torch.stack([states.float().mean(0) for states in images]).cpu().numpy(),
                "text_means": torch.stack([states.float().mean(0) for states in texts]).cpu().numpy(),
            }
        )
    return rows


def score_pairs(
    subject: Subject,
    pairs: Sequence[Pair],
    texts: Sequence[str],
    batch_size: int,
    title: str,
    *,
    parts: Parts | None = None,
    strict: bool = False,
    progress: bool = True,
) -> list[Row]:
    """[`score_batch`] of every pair's picture with the text beside it; where a batch fails, of its pairs one by one. A
    pair that cannot be scored has its reason under `ERROR`.

    Args:
        title: of the parts, which keep what has been scored.
        strict: stop at a pair that cannot be scored.

    Raises:
        ValueError: such a pair, if strict.
    """

    def score(batch: Sequence[tuple[Pair, str]]) -> list[Row]:
        return score_batch(subject, subject.encode([pair.image for pair, _ in batch], [text for _, text in batch]))

    def measure(part: Sequence[tuple[Pair, str]]) -> list[Row]:
        rows: list[Row] = []
        for start in range(0, len(part), batch_size):
            batch = part[start : start + batch_size]
            try:
                rows += score(batch)
            except ValueError:
                rows += [measured(lambda one: score([one])[0], one, one[0].id, strict) for one in batch]
        return rows

    chosen = list(zip(pairs, texts, strict=True))
    return measure_parts(title, chosen, measure, size=CHUNK, unit="pair", parts=parts, progress=progress)


def stacked(rows: Sequence[Row]) -> Row:
    """The scores of N pairs: float32 `(layers, N)`, means `(layers, N, D)`; image layers are 1 for ours."""
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}


def centred(runs: Sequence[Row]) -> list[np.ndarray]:
    """`centroid` of each run, float32 `(layers, N)`, after subtracting the means over all pairs of all runs."""
    image_mean, text_mean = (np.mean([run[name].mean(1) for run in runs], axis=0)[:, None] for name in MEANS)
    results = []
    for run in runs:
        image, text = run["image_means"] - image_mean, run["text_means"] - text_mean
        norms = np.linalg.norm(image, axis=-1) * np.linalg.norm(text, axis=-1)
        results.append((image * text).sum(-1) / np.maximum(norms, 1e-12))
    return results


def measure_similarity(
    subject: Subject,
    pairs: Sequence[Pair],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 8,
    parts: Parts | None = None,
    strict: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores of matched and mismatched pairs and how far they lie apart.

    A pair that cannot be scored is left out of everything: by itself before pairs are mismatched, and where only a
    mismatched text is at fault, together with its picture's other scores.

    Args:
        parts: keeps what has been scored.
        strict: stop at a pair that cannot be scored.

    Returns:
        The summary: `headline` (measure, layer and what [`separation`] returns), `layers` and `measures`: name -> one
        [`separation`] per layer, `left_out`: id and reason of pairs. And the scores as arrays: `matched/NAME` and
        `mismatched-SEED/NAME`, `(layers, N)`, with the pictures' `ids (N,)`.

    Raises:
        ValueError: fewer than two pairs can be scored.
    """
    settings: dict[str, Any] = {"parts": parts, "strict": strict, "progress": progress}
    matched = score_pairs(subject, pairs, [pair.text for pair in pairs], batch_size, "matched", **settings)
    left_out = failures(pairs, matched)
    usable = [(pair, row) for pair, row in zip(pairs, matched, strict=True) if ERROR not in row]
    _check_enough(usable, pairs, left_out)
    pairs, scored = [pair for pair, _ in usable], [[row for _, row in usable]]
    for seed in seeds:
        others = [pairs[index].text for index in derangement(len(pairs), seed)]
        scored.append(score_pairs(subject, pairs, others, batch_size, f"mismatched-{seed}", **settings))
        left_out += failures(pairs, scored[-1])
    whole = [index for index in range(len(pairs)) if not any(ERROR in rows[index] for rows in scored)]
    _check_enough(whole, pairs, left_out)
    pairs = [pairs[index] for index in whole]
    runs = [stacked([rows[index] for index in whole]) for rows in scored]
    by_run = [
        {name: run.get(name, middle) for name in (*HIDDEN, *QUERY_KEY)}
        for run, middle in zip(runs, centred(runs), strict=True)
    ]
    layers = {name: hidden_layers(subject) for name in HIDDEN} | {name: list(subject.attention) for name in QUERY_KEY}
    measures = {
        name: [
            {"layer": layer}
            | separation(by_run[0][name][at], [run[name][at] for run in by_run[1:]], bounded=name != "qk_logit")
            for at, layer in enumerate(layers[name])
        ]
        for name in (*HIDDEN, *QUERY_KEY)
    }
    headline_layer = layers[HEADLINE][-1] if subject.concatenates else max(subject.attention)
    headline = next(entry for entry in measures[HEADLINE] if entry["layer"] == headline_layer)
    titles = ["matched", *(f"mismatched-{seed}" for seed in seeds)]
    arrays = {
        f"{title}/{name}": values for title, run in zip(titles, by_run, strict=True) for name, values in run.items()
    }
    arrays["ids"] = np.array([pair.id for pair in pairs])
    summary = {
        "pairs": len(pairs),
        "left_out": left_out,
        "seeds": list(seeds),
        "concatenates": subject.concatenates,
        "headline": {"measure": HEADLINE, **headline},
        "measures": measures,
    }
    return summary, arrays


def _check_enough(scored: Sequence[Any], pairs: Sequence[Pair], left_out: Sequence[Mapping[str, str]]) -> None:
    if len(scored) < 2:
        raise ValueError(f"{len(scored)} of {len(pairs)} pairs can be scored; the first: {left_out[0]['reason']}")


def write_similarity(
    subject: Subject,
    name: str,
    pairs: Sequence[Pair],
    output: str | Path,
    left_out: LeftOut | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Writes `similarity.json` (returned), `scores.npz`, `histogram.png` (as figure 2) and `layers.png`. An
    interrupted call resumes.

    Args:
        left_out: of the rows that `pairs` come from, for the summary.
        settings: of [`measure_similarity`].
    """
    output, left_out = Path(output), left_out or LeftOut()
    parts = Parts(output, "similarity", subject.model, pairs)
    summary, arrays = measure_similarity(subject, pairs, parts=parts, **settings)
    summary = {"model": name, **summary, "left_out": left_out.bad + summary["left_out"]}
    summary["repeated_texts"] = left_out.repeated
    headline = summary["headline"]
    at = next(i for i, entry in enumerate(summary["measures"][HEADLINE]) if entry["layer"] == headline["layer"])
    mismatched = [arrays[f"mismatched-{seed}/{HEADLINE}"][at] for seed in summary["seeds"]]
    save_histogram(arrays[f"matched/{HEADLINE}"][at], np.concatenate(mismatched), name, headline, output)
    save_layers(summary["measures"], name, output)
    save_arrays(arrays, output / "scores.npz")
    write_json(output / "similarity.json", summary)
    parts.finish()
    return summary


def run_verb(arguments: argparse.Namespace) -> None:
    """`agevlm analyze similarity`, with the arguments of `cli.py`."""
    pairs, left_out = load_pairs(
        arguments.data, arguments.limit, arguments.text, distinct=True, strict=arguments.strict, progress=True
    )
    subject = Subject(*load(arguments.model, trust_remote_code=arguments.trust_remote_code))
    name = Path(arguments.model).resolve().name
    summary = write_similarity(
        subject,
        name,
        pairs,
        arguments.output,
        left_out,
        seeds=range(arguments.seeds),
        batch_size=arguments.batch_size,
        strict=arguments.strict,
    )
    headline = summary["headline"]
    low, high = headline["auroc_interval"]
    print(
        f"{name}, layer {headline['layer']}: matched {headline['matched']['mean']:.3f}, mismatched "
        f"{headline['mismatched']['mean']:.3f}, overlap {headline['overlap']:.2f}, AUROC {headline['auroc']:.3f} "
        f"[{low:.3f}, {high:.3f}] over {summary['pairs']} pairs "
        f"({LeftOut(summary['left_out'], left_out.repeated)})"
    )
    written(arguments.output, f"agevlm analyze attention {shlex.quote(arguments.model)} PICTURE QUESTION --output OUT")
