"""Checkpoint folders that are either complete or invisible.

Trainer writes `checkpoint-N` file by file; a run killed meanwhile leaves a folder that only looks like a checkpoint.
Here everything is written below `.incomplete` in the run's folder and renamed when it is complete (`store.py`).
"""

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from agevlm.store import publish


STAGING = ".incomplete"


def staging_folder(run_folder: str | os.PathLike) -> Path:
    """The folder in which `run_folder` collects incomplete checkpoints."""
    return Path(run_folder) / STAGING


def publish_folder(source: Path, target: Path) -> None:
    """Rename the finished folder `source` to `target`; a folder that is already there is replaced."""
    if target.exists():
        retired = staging_folder(target.parent) / f"replaced-{target.name}"
        retired.parent.mkdir(exist_ok=True)
        publish(target, retired)
    publish(source, target)


def publish_files(source: Path, target: Path, last: str) -> None:
    """Move every file of `source` into the existing folder `target`, each in one step, the one named `last` last.

    Readers that wait for `last` therefore never see a part of the rest.
    """
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name == last, name))
    for name in names:
        publish(source / name, target / name)


def remove_leftovers(run_folder: str | os.PathLike) -> None:
    """Delete what killed runs have left unfinished in `run_folder`."""
    shutil.rmtree(staging_folder(run_folder), ignore_errors=True)


def remove_checkpoints(run_folder: str | os.PathLike) -> None:
    """Delete the checkpoints of a run that is started again: with more steps than its own, they would count as newer
    and be kept in their place."""
    while (checkpoint := get_last_checkpoint(run_folder)) is not None:
        shutil.rmtree(checkpoint)
