"""Stand-ins for commands that fetch packages, first in the search path."""

from collections.abc import Mapping
from pathlib import Path


def put_in_path(folder: Path, monkeypatch, scripts: Mapping[str, str]) -> None:
    """Commands by name, shell scripts in `folder`/bin; each call is a line of `folder`/log."""
    tools = folder / "bin"
    tools.mkdir()
    for name, body in scripts.items():
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/log\n{body}\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")


def called(folder: Path) -> list[str]:
    """The commands that were called, in their order."""
    return [line.split()[0] for line in (folder / "log").read_text().splitlines()]
