"""Several processes by accelerate (`accelerate launch -m agevlm eval ...`): shares of the work."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState


def is_main() -> bool:
    """Whether this process writes results."""
    return PartialState().is_main_process


def current_device() -> torch.device | None:
    """This process's accelerator, None where there is none."""
    device = PartialState().device
    return None if device.type == "cpu" else device


def my_share(items: Sequence[Any]) -> list[Any]:
    """Every n-th of `items`, so that all processes have about as much to do wherever the hard ones lie."""
    state = PartialState()
    return list(items[state.process_index :: state.num_processes])
