"""Runs scripts of this folder in processes of their own, and compares what runs have left."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file

from builders import same


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run_worker(
    module: ModuleType, *arguments: object, launcher=(sys.executable,), killed=False, seconds=280, **environment: str
) -> str:
    """Runs the file of a helper module; it must end well, or with `killed` kill itself. Returns what it printed."""
    here = str(Path(module.__file__).parent)
    known = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": here, **environment}
    command = [*launcher, module.__file__, *map(str, arguments)]
    run = subprocess.run(command, env=known, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == (-signal.SIGKILL if killed else 0), run.stderr[-3000:]
    return run.stdout


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return same(first, second)
