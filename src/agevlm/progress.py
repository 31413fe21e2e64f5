"""Progress of long work: a bar on a terminal, a line now and then in a log file; and the last line of a verb.

A file (nohup, SLURM, CI) shows no bar. While `lines` runs, a thread prints every `EVERY` seconds how far the innermost
open `Bar` is: count, rate, time left and what it carries, such as a loss. Where none is open, it says for how long the
verb has worked. A bar's last line comes when it closes.
"""

import io
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


EVERY = 30.0  # seconds between two lines
_LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
_open: dict[int, "Bar"] = {}  # the innermost last
_by_line = False


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class Bar(tqdm):
    """tqdm's bar, silent while `lines` speaks for it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{**options, **({"file": _Nowhere()} if _by_line else {})})
        if not self.disable:
            _open[id(self)] = self

    def close(self) -> None:
        if _open.pop(id(self), None) is not None and _by_line and self.n:
            _say(self.line())
        super().close()

    def line(self) -> str:
        """How far it is."""
        line = self.format_meter(**{**self.format_dict, "bar_format": _LINE, "ncols": None})
        return line.replace(",  ", ", ")  # tqdm pads some rates


def start_lines(verb: str | None = None) -> threading.Event:
    """Lines in place of bars from now on, on stderr, of the first process of several alone. The event ends them.

    Args:
        verb: what works where no bar is open; None prints nothing then.
    """
    global _by_line
    _by_line, ended = True, threading.Event()
    threading.Thread(target=_tell, args=(verb, ended), daemon=True).start()
    return ended


@contextmanager
def lines(verb: str) -> Iterator[None]:
    """`start_lines` until the end."""
    global _by_line
    before, ended = _by_line, start_lines(verb)
    try:
        yield
    finally:
        ended.set()
        _by_line = before


def _tell(verb: str | None, ended: threading.Event) -> None:
    begun = time.monotonic()
    while not ended.wait(EVERY):
        bars = list(_open.values())
        if bars or verb:
            minutes = (time.monotonic() - begun) / 60
            _say(bars[-1].line() if bars else f"{verb}: {minutes:.1f} minutes so far")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def written(place: str | Path, then: str = "") -> None:
    """Print a verb's last line: where its result lies, and the command that uses it, with `{}` for the place."""
    command = then.replace("{}", shlex.quote(str(place)))
    print(f"written to {place}" + (f"; next: {command}" if command else ""), flush=True)
