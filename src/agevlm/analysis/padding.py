"""How much attention goes to padding, and what other ways of making a picture square change (paper appendix C).

Every picture that is not square is shown four ways: as the model's own processor does it (`own`), and made square
beforehand, so that no processor can know: `pad` (centred on the processor's mean color), `stretch`, `crop`. For each,
and per layer, the look of the question's tokens gives

- `share`: attention on the cells that show less than half picture under `own`, or under `pad` for the three others;
- `area`: those cells' share of all cells;
- `enrichment`: share / area, 1 for an even spread. Under `stretch` and `crop` the same cells show picture: their
  share is the attention of any border, and only more than that is due to padding.

Our processor masks cells without any picture, so its `own` share is that of border cells that show a little; under
`pad` it cannot mask the padding. `in_mask` is the attention inside the masks of rows that have one.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agevlm.models import load
from agevlm.progress import written
from agevlm.stats import Measure, interval, nested
from agevlm.store import write_json

from .attention import question_look
from .figures import save_padding
from .pairs import LeftOut, Pair, load_pairs
from .resume import ERROR, Parts, Row, failures, measure_parts, measured
from .subjects import Subject


VARIANTS = ("own", "pad", "stretch", "crop")
PADDING = 0.5  # a cell that shows less picture than this is padding
CHUNK = 16  # pictures in a part that a resumed run does not repeat


def squared(image: Image.Image, variant: str, color: int | tuple[int, ...] = 0) -> Image.Image:
    """The picture as it is (`own`), or as a square of its longer side. Masks (mode 1) stay masks."""
    if variant == "own":
        return image
    side, short = max(image.size), min(image.size)
    resample = Image.Resampling.NEAREST if image.mode == "1" else Image.Resampling.BICUBIC
    if variant == "pad":
        canvas = Image.new(image.mode, (side, side), color)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas
    if variant == "stretch":
        return image.resize((side, side), resample)
    if variant == "crop":
        left, top = (image.width - short) // 2, (image.height - short) // 2
        return image.crop((left, top, left + short, top + short)).resize((side, side), resample)
    raise ValueError(f"variant is {variant!r}; use {', '.join(VARIANTS)}")


def mean_color(subject: Subject) -> tuple[int, ...]:
    """The color that becomes about 0 in the model's input: what "zero-padding" means."""
    mean = getattr(subject.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
    return tuple(int(255 * value) for value in mean)


def measure_picture(subject: Subject, pair: Pair) -> dict[str, dict[str, Any]]:
    """Variant -> `share (K,)`, `area`, `image_mass (K,)`, and with a mask `in_mask (K,)` and `mask_area` (but not
    where `crop` has cut the masked part away), for the K layers in which text looks at pictures."""
    results: dict[str, dict[str, Any]] = {}
    own, outline = pair.image, pair.mask
    everywhere = Image.new("1", own.size, 1)
    for variant in VARIANTS:
        image = squared(own, variant, mean_color(subject))
        mask = None if outline is None else squared(outline, variant)
        cells, weights, mass = question_look(subject, image, pair.text, list(subject.attention))
        if variant in ("own", "pad"):  # the others are measured on the cells that `pad` leaves empty
            padding = cells.coverage(np.asarray(squared(everywhere, variant))) < PADDING
        result = {"share": weights[:, padding].sum(1), "area": float(padding.mean()), "image_mass": mass}
        if mask is not None and mask.getbbox() is not None:
            inside = cells.inside(np.asarray(mask))
            result |= {"in_mask": weights[:, inside].sum(1), "mask_area": float(inside.mean())}
        results[variant] = result
    return results


def _ratio(shares: np.ndarray, areas: np.ndarray) -> dict[str, Any]:
    """Mean share over mean area with its 95 % interval over pictures; None where there is no such area."""
    result: dict[str, Any] = {"share": float(shares.mean()), "area": float(areas.mean())}
    if not areas.any():
        return {**result, "enrichment": None, "interval": None}
    spread = interval(Measure(((1.0, shares, areas),), scale=1.0), np.arange(len(shares)))
    return {**result, "enrichment": float(shares.mean() / areas.mean()), "interval": spread}


def summarize(records: Sequence[dict[str, dict[str, Any]]], layers: Sequence[int]) -> dict[str, Any]:
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
        masked = [row for row in rows if "in_mask" in row]
        if masked:
            inside = np.array([row["in_mask"].mean() for row in masked], dtype=np.float64)
            entry["in_mask"] = {"n": len(masked), **_ratio(inside, np.array([row["mask_area"] for row in masked]))}
        summary[variant] = entry
    return summary


def measure_padding(
    subject: Subject,
    pairs: Sequence[Pair],
    *,
    parts: Parts | None = None,
    strict: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The four variants over all pictures that are not square.

    Args:
        parts: keeps what has been measured.
        strict: stop at a picture that cannot be measured; else it is left out and named in `left_out`.

    Raises:
        ValueError: all pictures are square, or so nearly that no cell is padding.
    """

    def measure(pair: Pair) -> Row:
        """[`measure_picture`] with keys `VARIANT/NAME`; nothing of a picture that leaves no cell empty."""
        record = {} if pair.image.width == pair.image.height else measure_picture(subject, pair)
        if not record or not record["pad"]["area"]:
            return {}
        return {f"{variant}/{name}": np.asarray(v) for variant, entry in record.items() for name, v in entry.items()}

    def measure_all(part: Sequence[Pair]) -> list[Row]:
        return [measured(measure, pair, pair.id, strict) for pair in part]

    rows = measure_parts("padding", pairs, measure_all, size=CHUNK, unit="picture", parts=parts, progress=progress)
    left_out = failures(pairs, rows)
    records = [
        nested({tuple(key.split("/")): v for key, v in row.items()}) for row in rows if row and ERROR not in row
    ]
    if not records:
        first = f"; {len(left_out)} failed, the first: {left_out[0]['reason']}" if left_out else ""
        raise ValueError(
            f"none of {len(pairs)} pictures leaves a cell empty when it is padded; give oblong pictures{first}"
        )
    return {
        "pictures": len(records),
        "without_padding": len(pairs) - len(records) - len(left_out),
        "left_out": left_out,
        "layers": list(subject.attention),
        "variants": summarize(records, list(subject.attention)),
    }


def run_verb(arguments: argparse.Namespace) -> None:
    """`agevlm analyze padding`, with the arguments of `cli.py`."""
    output = Path(arguments.output)
    pairs, left_out = load_pairs(
        arguments.data, arguments.limit, arguments.text, strict=arguments.strict, progress=True
    )
    subject = Subject(*load(arguments.model, trust_remote_code=arguments.trust_remote_code))
    name = Path(arguments.model).resolve().name
    parts = Parts(output, "padding", subject.model, pairs)
    summary = {"model": name, **measure_padding(subject, pairs, parts=parts, strict=arguments.strict)}
    summary["left_out"] = left_out.bad + summary["left_out"]
    save_padding(summary["variants"], name, output)
    write_json(output / "padding.json", summary)
    parts.finish()
    print(
        f"{name}: {summary['pictures']} pictures, {summary['without_padding']} without padding, "
        f"{LeftOut(summary['left_out'])}"
    )
    for variant, entry in summary["variants"].items():
        ratio = "-" if entry["enrichment"] is None else f"{entry['enrichment']:.2f}"
        inside = f", in the mask {entry['in_mask']['share']:.3f}" if "in_mask" in entry else ""
        print(f"  {variant:8} share {entry['share']:.3f} of area {entry['area']:.3f}, enrichment {ratio}{inside}")
    written(output, f"agevlm analyze attention {shlex.quote(arguments.model)} PICTURE QUESTION --output OUT")
