"""`agevlm export`: a checkpoint as ONNX or torch.export graphs, with its processor."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from agevlm.arguments import VerbParser
from agevlm.progress import written
from agevlm.store import check_free, check_same, digest, new_folder, read_table, write_json


IDENTITY = "agevlm_export.json"  # what an export was made of


def main(argv: list[str] | None = None) -> None:
    """Export a checkpoint to ONNX (also int8) or torch.export, with its processor.

    agevlm export checkpoints/agevlm-tiny --output exported              # ONNX, float32
    agevlm export checkpoints/agevlm-tiny --output exported --int8       # int8 weights
    agevlm export checkpoints/agevlm-tiny --output exported --format dynamo

    OUT holds `vision` and `decoder` (`serving/exported.py` has the cut), the configurations and the processor, and is
    run by `agevlm.serving.exported.ExportedAgeVlm.from_pretrained(OUT).generate(...)`. Needs `agevlm[export]`.

    The same command again finds OUT finished.

    Raises:
        ValueError: OUT holds something else, there is no AGE-VLM checkpoint of that name, or the options do not go
            together.
    """
    parser = VerbParser("export", main.__doc__)
    parser.add_argument("checkpoint", help="folder or Hub repository of an AGE-VLM")
    parser.add_output("new folder")
    parser.add_argument("--format", choices=["onnx", "dynamo"], default="onnx", help="dynamo: torch.export's .pt2")
    parser.add_argument("--int8", action="store_true", help="ONNX only: dynamic quantization of all matrix products")
    parser.add_argument("--images", type=int, default=1, help="places for pictures per row (default: 1)")
    options = parser.parse_args(argv)
    output = options.output.absolute()
    there = read_table(output / IDENTITY)
    if not there:
        check_free(options.output)
    if options.images < 1:
        raise ValueError(f"`--images` must be at least 1, got {options.images}.")

    import torch

    from agevlm.models import load
    from agevlm.serving.exported import export

    model, processor = load(options.checkpoint, ours=True, dtype=torch.float32, device_map=None)
    identity = _identity(model, processor, options.format, options.int8, options.images)
    if there:
        check_same(options.output, there, identity, "export")
        print(f"{options.output} holds this export, nothing to do")
        return
    size = processor.image_processor.size
    print(f"{options.checkpoint}: its graphs are being traced, which takes a minute or more", flush=True)
    try:
        with quiet():
            exported = export(
                model,
                image_size=(size["height"], size["width"]),
                images=options.images,
                export_format=options.format,
                int8=options.int8,
            )
    except ImportError as error:
        raise ValueError(f"{error} All of it: pip install agevlm[export].") from error
    with new_folder(output) as made:
        exported.save_pretrained(made)
        processor.save_pretrained(made)
        write_json(made / IDENTITY, identity)
    for file in sorted(output.iterdir()):
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file.name}")
    written(options.output, f"agevlm.serving.exported.ExportedAgeVlm.from_pretrained({str(options.output)!r})")


def _identity(model: Any, processor: Any, export_format: str, int8: bool, images: int) -> dict[str, Any]:
    """All that decides the files of an export but the versions of libraries."""
    from agevlm.training.lineage import model_fingerprint

    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    settings = [config, model.generation_config.to_dict(), processor.to_dict(), processor.chat_template]
    return {
        "weights": model_fingerprint(model),
        "settings": digest(json.dumps(settings, sort_keys=True, default=str), size=8),
        "tokenizer": digest(processor.tokenizer.backend_tokenizer.to_str(), size=8),
        "format": export_format,
        "int8": int8,
        "images": images,
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings of what they are and lack, which read like failures. Errors pass."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
