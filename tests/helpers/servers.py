"""A server in a process of its own, which has answered once."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: Sequence[str], address: str, log: Path, seconds: int = 240, **options: Any) -> Iterator[None]:
    """Runs `command` from the first answer at `address` on. The test fails, with the log, if there is none."""
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, **options) as process:
        try:
            for _ in range(seconds):
                try:
                    with urllib.request.urlopen(address, timeout=5):
                        break
                except OSError:
                    assert process.poll() is None, log.read_text()
                    time.sleep(1)
            else:
                pytest.fail(log.read_text())
            yield
        finally:
            process.terminate()
