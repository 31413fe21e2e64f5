"""`agevlm export`: a checkpoint as ONNX or torch.export graphs, with its processor."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from agevlm.arguments import VerbParser
from agevlm.progress import written
from agevlm.store import check_free, new_folder


def main(argv: list[str] | None = None) -> None:
    """Export a checkpoint to ONNX (also int8) or torch.export, with its processor.

    agevlm export checkpoints/agevlm-tiny --output exported              # ONNX, float32
    agevlm export checkpoints/agevlm-tiny --output exported --int8       # int8 weights
    agevlm export checkpoints/agevlm-tiny --output exported --format dynamo

    OUT holds `vision` and `decoder` (`serving/exported.py` has the cut), the configurations and the processor, and is
    run by `agevlm.serving.exported.ExportedAgeVlm.from_pretrained(OUT).generate(...)`. Needs `agevlm[export]`.

    Raises:
        ValueError: OUT is in use, there is no AGE-VLM checkpoint of that name, or the options do not go together.
    """
    parser = VerbParser("export", main.__doc__)
    parser.add_argument("checkpoint", help="folder or Hub repository of an AGE-VLM")
    parser.add_output("new folder")
    parser.add_argument("--format", choices=["onnx", "dynamo"], default="onnx", help="dynamo: torch.export's .pt2")
    parser.add_argument("--int8", action="store_true", help="ONNX only: dynamic quantization of all matrix products")
    parser.add_argument("--images", type=int, default=1, help="places for pictures per row (default: 1)")
    options = parser.parse_args(argv)
    check_free(options.output)
    if options.images < 1:
        raise ValueError(f"`--images` must be at least 1, got {options.images}.")

    import torch

    from agevlm.models import load
    from agevlm.serving.exported import export

    model, processor = load(options.checkpoint, ours=True, dtype=torch.float32, device_map=None)
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
    output = options.output.absolute()
    with new_folder(output) as made:
        exported.save_pretrained(made)
        processor.save_pretrained(made)
    for file in sorted(output.iterdir()):
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file.name}")
    written(options.output, f"agevlm.serving.exported.ExportedAgeVlm.from_pretrained({str(options.output)!r})")


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
