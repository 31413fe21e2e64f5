"""The arguments that decide the content of a folder of scenes."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path


MOST_OBJECTS = 10
SPLITS = ("composition", "name", "style")


@dataclass(frozen=True)
class SceneArguments:
    """Everything that decides the content of a folder of scenes.

    Args:
        captions, instructions: numbers of training rows (one picture each).
        test: number of questions of each benchmark in each split (HallusionBench: rounded down to whole sets of 4).
        size: side of the pictures in pixels.
        min_objects, max_objects: fewest and most objects in a picture, 1 to 10. Questions that need two are given two.
            More than 4 are small: clutter.
        turns: questions per instruction row.
        cutouts: folder made by `agevlm data cutouts`; None draws icons.
        backgrounds: folder of photographs to paste on; None generates backgrounds.
        names, colors: restrict the objects; unknown ones raise ValueError with close matches.
        presence_first: share of the instruction rows, the first ones, that ask for presence alone. A small model
            learns to look things up from them, and all else after that.
        splits: those that get benchmarks, of `splits.SPLITS`. With few names, the split "name" cannot fill pictures of
            many objects.
        word_rate: share of instruction pictures with a sign on them (captions: half of it).

    Raises:
        ValueError: a number that is out of its range.
    """

    captions: int = 20_000
    instructions: int = 10_000
    test: int = 500
    size: int = 224
    min_objects: int = 1
    max_objects: int = 4
    turns: int = 4
    seed: int = 0
    cutouts: str | Path | None = None
    backgrounds: str | Path | None = None
    names: Collection[str] | None = None
    colors: Collection[str] | None = None
    word_rate: float = 0.25
    presence_first: float = 0.0
    splits: Collection[str] = SPLITS

    def __post_init__(self) -> None:
        for field, least in (("captions", 0), ("instructions", 0), ("test", 0), ("size", 64), ("turns", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; use at least {least}")
        if not 1 <= self.max_objects <= MOST_OBJECTS:
            raise ValueError(f"max_objects is {self.max_objects}; use 1 to {MOST_OBJECTS}")
        if not 1 <= self.min_objects <= self.max_objects:
            raise ValueError(f"min_objects is {self.min_objects}; use 1 to max_objects, {self.max_objects}")
        for field in ("word_rate", "presence_first"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; use 0 to 1")
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise ValueError(f"splits has {', '.join(unknown)}; use some of {', '.join(SPLITS)}")
        object.__setattr__(self, "splits", tuple(split for split in SPLITS if split in self.splits))
        for field in ("names", "colors"):
            if (words := getattr(self, field)) is not None:
                object.__setattr__(self, field, tuple(sorted(words)))
