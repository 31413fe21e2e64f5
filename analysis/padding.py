"""How much attention goes to padding, and what other ways of making a picture square change (paper appendix C).

    agevlm analyze padding MODEL DATA --output DIR

Every picture that is not square is shown four ways: as the model's own processor does it (`own`), and made square
beforehand, so that no processor can know: `pad` (centred on the processor's mean colour), `stretch`, `crop`. For each,
and per layer, the look of the question's tokens gives

- `share`: attention on the cells that show less than half picture under `own`, or under `pad` for the three others;
- `area`: those cells' share of all cells;
- `enrichment`: share / area, 1 for a model that does not care. Under `stretch` and `crop` the same cells show picture:
  what they get there is what a model gives to a border anyway, and only more than that is due to padding.

Ours masks cells without any picture out, so what is left of its `own` share is that of border cells that show a little
(none at all would be 0 by construction); `pad` is what it would do if nobody told it. Where rows have masks of what is
asked about, `in_mask` is the attention inside them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .attention import question_look
from .figures import save_padding
from .files import save_json
from .pairs import Pair, load_pairs
from .subjects import Subject, load_subject


VARIANTS = ("own", "pad", "stretch", "crop")
PADDING = 0.5  # a cell that shows less picture than this is padding
RESAMPLES = 1000


def squared(image: Image.Image, variant: str, colour: int | tuple[int, ...] = 0) -> Image.Image:
    """The picture as a square of its longer side, by `pad`, `stretch` or `crop`. Masks (mode 1) stay masks."""
    side, short = max(image.size), min(image.size)
    resample = Image.Resampling.NEAREST if image.mode == "1" else Image.Resampling.BICUBIC
    if variant == "pad":
        canvas = Image.new(image.mode, (side, side), colour)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas
    if variant == "stretch":
        return image.resize((side, side), resample)
    if variant == "crop":
        left, top = (image.width - short) // 2, (image.height - short) // 2
        return image.crop((left, top, left + short, top + short)).resize((side, side), resample)
    raise ValueError(f"variant is {variant!r}; use pad, stretch or crop")


def mean_colour(subject: Subject) -> tuple[int, ...]:
    """The colour that becomes about 0 in the model's input: what "zero-padding" means."""
    mean = getattr(subject.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return tuple(int(255 * value) for value in mean)


def measure_picture(subject: Subject, pair: Pair, layers: Sequence[int] | None = None) -> dict[str, dict[str, Any]]:
    """Variant -> `share (K,)`, `area`, `image_mass (K,)`, and with a mask `in_mask (K,)` and `mask_area` (both None
    where `crop` has cut the masked part away)."""
    results: dict[str, dict[str, Any]] = {}
    white = Image.new("1", pair.image.size, 1)
    border = None
    for variant in VARIANTS:
        if variant == "own":
            image, mask = pair.image, pair.mask
        else:
            image = squared(pair.image, variant, mean_colour(subject))
            mask = None if pair.mask is None else squared(pair.mask, variant)
        cells, weights, mass = question_look(subject, image, pair.text, layers)
        if variant == "own":
            padding = cells.shown < PADDING
        else:
            if border is None:  # of `pad`, which comes first
                border = cells.coverage(np.asarray(squared(white, "pad"))) < PADDING
            padding = border
        result = {"share": weights[:, padding].sum(1), "area": float(padding.mean()), "image_mass": mass}
        if mask is not None:
            seen = mask.getbbox() is not None
            inside = cells.inside(np.asarray(mask)) if seen else None
            result["in_mask"] = weights[:, inside].sum(1) if seen else None
            result["mask_area"] = float(inside.mean()) if inside is not None else None
        results[variant] = result
    return results


def _ratio(shares: np.ndarray, areas: np.ndarray) -> dict[str, Any]:
    """Mean share over mean area with its 95 % interval over pictures; None where there is no such area."""
    result: dict[str, Any] = {"share": float(shares.mean()), "area": float(areas.mean())}
    if not areas.any():
        return {**result, "enrichment": None, "interval": None}
    n = len(shares)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    resampled = (counts @ shares) / np.maximum(counts @ areas, 1e-12)
    interval = [float(value) for value in np.quantile(resampled, (0.025, 0.975))]
    return {**result, "enrichment": float(shares.mean() / areas.mean()), "interval": interval}


def summarise(records: Sequence[dict[str, dict[str, Any]]], layers: Sequence[int]) -> dict[str, Any]:
    """Variant -> `share`, `area`, `enrichment`, `interval` (mean over layers), the same per layer, `image_mass`, and
    `in_mask` {n, share, area, enrichment, interval} where there are masks."""
    summary: dict[str, Any] = {}
    for variant in VARIANTS:
        rows = [record[variant] for record in records]
        shares = np.stack([row["share"] for row in rows]).astype(np.float64)  # (N, K)
        areas = np.array([row["area"] for row in rows])
        entry = _ratio(shares.mean(1), areas)
        entry["layers"] = [{"layer": layer, **_ratio(shares[:, at], areas)} for at, layer in enumerate(layers)]
        entry["image_mass"] = np.mean([row["image_mass"] for row in rows], axis=0).tolist()
        masked = [row for row in rows if row.get("in_mask") is not None]
        if masked:
            inside = np.array([row["in_mask"].mean() for row in masked], dtype=np.float64)
            entry["in_mask"] = {"n": len(masked), **_ratio(inside, np.array([row["mask_area"] for row in masked]))}
        summary[variant] = entry
    return summary


def measure_padding(
    subject: Subject, pairs: Sequence[Pair], *, layers: Sequence[int] | None = None, progress: bool = True
) -> dict[str, Any]:
    """The four variants over all pictures that are not square.

    Args:
        layers: indices. Default: every layer in which text looks at pictures.

    Raises:
        ValueError: all pictures are square, or so nearly that no cell is padding.
    """
    chosen = list(subject.attention) if layers is None else sorted(set(layers))
    oblong = [pair for pair in pairs if pair.image.width != pair.image.height]
    records = []
    for pair in tqdm(oblong, desc="padding", unit="picture", disable=not progress):
        record = measure_picture(subject, pair, chosen)
        if record["pad"]["area"]:
            records.append(record)
    if not records:
        raise ValueError(f"none of {len(pairs)} pictures leaves a cell empty when it is padded; give oblong pictures")
    return {
        "pictures": len(records),
        "without_padding": len(pairs) - len(records),
        "layers": chosen,
        "variants": summarise(records, chosen),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="agevlm analyze padding", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of ours or of a concatenating model")
    parser.add_argument(
        "data", metavar="DATA", help="folder of scenes, or a .parquet or .jsonl with pictures and texts"
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--text", metavar="COLUMN", help="default: the first answer of `messages`, caption or question"
    )
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="pictures (default 200)")
    parser.add_argument("--strict", action="store_true", help="stop at a bad row instead of leaving it out")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a checkpoint")
    arguments = parser.parse_args(argv)
    pairs, skipped = load_pairs(arguments.data, arguments.limit, arguments.text, strict=arguments.strict)
    subject = load_subject(arguments.model, arguments.trust_remote_code)
    name, output = Path(arguments.model).resolve().name, Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    summary = {"model": name, "rows_left_out": skipped, **measure_padding(subject, pairs)}
    save_padding(summary["variants"], name, output)
    save_json(summary, output / "padding.json")
    print(f"{name}: {summary['pictures']} pictures, {summary['without_padding']} without padding, {skipped} left out")
    for variant, entry in summary["variants"].items():
        ratio = "-" if entry["enrichment"] is None else f"{entry['enrichment']:.2f}"
        inside = f", in the mask {entry['in_mask']['share']:.3f}" if "in_mask" in entry else ""
        print(f"  {variant:8} share {entry['share']:.3f} of area {entry['area']:.3f}, enrichment {ratio}{inside}")
    print(f"written to {output}")
