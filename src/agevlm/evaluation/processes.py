"""Several processes by accelerate (`accelerate launch -m agevlm eval ...`): who I am, waiting, gathering.

One process needs no launcher, and then nothing distributed is set up.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def state() -> PartialState | None:
    """accelerate's state if a launcher has started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return PartialState()


def rank() -> int:
    """Number of this process; 0 is the one that writes results."""
    current = state()
    return 0 if current is None else current.process_index


def world_size() -> int:
    current = state()
    return 1 if current is None else current.num_processes


def current_device() -> torch.device | None:
    """This process's accelerator, None where there is none."""
    current = state()
    if current is not None:
        return current.device if current.device.type != "cpu" else None
    return torch.accelerator.current_accelerator(check_available=True)


def wait() -> None:
    """Until every process is here."""
    current = state()
    if current is not None:
        current.wait_for_everyone()


def my_share(items: Sequence[Any]) -> list[Any]:
    """Every n-th of `items`, so that all processes have about as much to do wherever the hard ones lie."""
    return list(items[rank() :: world_size()])


def gather(items: list[Any]) -> list[Any]:
    """The items of all processes, on every process, first those of process 0."""
    return items if state() is None else gather_object(items)
