"""Numbers on the command line."""

import argparse
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """A type of argparse's: an integer that is not below `lowest`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too few; give {lowest} or more")
        return value

    return integer
