"""The parser of a verb: one form of help, `--output`, numbers with a lowest value, and old spellings.

Modules that build a parser import nothing heavy at their top, so that a help is printed at once.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def note_old(old: str, new: str) -> None:
    """Say on stderr that a spelling has changed."""
    print(f"agevlm: {old} is now {new}; the old spelling works for one more release", file=sys.stderr)


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
        self.renamed: dict[str, str] = {}
        self.output_was_positional = False

    def rename(self, old: str, new: str) -> None:
        """Accept the option `old` as `new`, with a note."""
        self.renamed[old] = new

    def add_output(self, text: str, metavar: str = "OUT") -> None:
        """A required `--output`, which was the last positional argument before and is accepted as such."""
        self.output_was_positional = True
        self.add_argument("--output", type=Path, metavar=metavar, help=f"{text} (required)")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        """As argparse's, old spellings included."""
        words = [self._current(word) for word in (sys.argv[1:] if args is None else args)]
        options, rest = self.parse_known_args(words, namespace)
        rest = [word for word in rest if word != "--"]
        if self.output_was_positional and options.output is None:
            if len(rest) == 1 and not rest[0].startswith("-"):
                note_old(f"`{self.prog} ... {rest[0]}`", f"`--output {rest[0]}`")
                options.output = Path(rest.pop())
            elif not rest:
                self.error("the following arguments are required: --output")
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options

    def _current(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name not in self.renamed:
            return word
        note_old(name, self.renamed[name])
        return self.renamed[name] + equals + value


def at_least(lowest: int) -> Callable[[str], int]:
    """A type of argparse's: an integer that is not below `lowest`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too few; give {lowest} or more")
        return value

    return integer
