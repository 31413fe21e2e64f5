"""The verb `env`."""

import os
import platform
from importlib.metadata import version

from agevlm.arguments import VerbParser


PACKAGES = (
    "agevlm",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "peft",
    "safetensors",
    "pillow",
    "qtawesome",
)


def main(argv: list[str] | None = None) -> None:
    """Print the versions and the machine for a bug report."""
    VerbParser("env", main.__doc__).parse_args(argv)
    import torch

    rows = {
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "CPU cores": os.cpu_count(),
        "accelerator": torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none",
        **{package: version(package) for package in PACKAGES},
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
