"""The parser of a verb: one form of help, `--output`, and numbers with a lowest value.

Modules that build a parser import nothing heavy at their top, so that a help is printed at once.
"""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path


class VerbParser(argparse.ArgumentParser):
    """The parser of `agevlm VERB`.

    Args:
        verb: the words after `agevlm`.
        about: the text above the options, usually the docstring of the verb's function.
    """

    def __init__(self, verb: str, about: str | None):
        super().__init__(
            prog=f"agevlm {verb}",
            description=inspect.cleandoc(about or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_output(self, text: str, metavar: str = "OUT") -> None:
        """A required `--output`."""
        self.add_argument("--output", type=Path, required=True, metavar=metavar, help=f"{text} (required)")


def at_least(lowest: int) -> Callable[[str], int]:
    """A type of argparse's: an integer that is not below `lowest`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too few; give {lowest} or more")
        return value

    return integer
