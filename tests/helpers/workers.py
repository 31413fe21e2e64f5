"""Runs work in processes of its own, and compares what runs have left."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from servers import free_port

from builders import same


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FORK = multiprocessing.get_context("fork")

# torch makes its thread pool anew in a fork, at its first use. If two threads use it first at the same time (weights
# are loaded by several), one gets none and raises "Invalid thread pool!". So it is used once before they start.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def run_worker(
    module: ModuleType, *arguments: object, launcher=(sys.executable,), seconds=280, **environment: str
) -> str:
    """Runs the file of a helper module, which must end well. Returns what it printed."""
    here = str(Path(module.__file__).parent)
    known = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": here, **environment}
    command = [*launcher, module.__file__, *map(str, arguments)]
    run = subprocess.run(command, env=known, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def fork(*works: Callable[[], object], killed: bool = False, seconds: int = 280) -> None:
    """Runs each work in a fork of this process, all at once: what is imported and patched here is so there.

    They must end well, or with `killed` kill themselves.
    """
    processes = [FORK.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ended == [-signal.SIGKILL if killed else 0] * len(works)


def fork_ranks(work: Callable[[], object], count: int = 2) -> None:
    """Runs `work` in processes that find each other as those of a torchrun do."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}

    def ranked(rank: int) -> Callable[[], None]:
        def run() -> None:
            os.environ.update(places, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            work()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

        return run

    fork(*map(ranked, range(count)))


def killed_here(*_: object, **__: object) -> None:
    """Kills this process: in place of a function, at that function."""
    os.kill(os.getpid(), signal.SIGKILL)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return same(first, second)
