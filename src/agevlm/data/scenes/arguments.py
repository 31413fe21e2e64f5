"""The arguments that decide the content of a folder of scenes."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated


MOST_OBJECTS = 10
SPLITS = ("composition", "name", "style")


@dataclass(frozen=True)
class SceneArguments:
    """Everything that decides the content of a folder of scenes; `agevlm data scenes --help` shows the texts.

    With few names, the split "name" cannot fill pictures of many objects. A small model learns to look things up from
    rows on presence, and all else after that.

    Raises:
        ValueError: a number that is out of its range.
    """

    captions: Annotated[int, "training pictures with a caption"] = 20_000
    instructions: Annotated[int, "training pictures with questions"] = 10_000
    test: Annotated[int, "questions of each benchmark in each split (HallusionBench: whole sets of 4)"] = 500
    size: Annotated[int, "side of a picture in pixels"] = 224
    min_objects: Annotated[int, "fewest objects in a picture; questions that need two are given two"] = 1
    max_objects: Annotated[int, "most objects in a picture, up to 10; more than 4 are small"] = 4
    turns: Annotated[int, "questions per instruction row"] = 4
    seed: Annotated[int, "another seed gives other pictures, not other splits"] = 0
    cutouts: Annotated[str | Path | None, "folder made by `agevlm data cutouts`, else icons"] = None
    backgrounds: Annotated[str | Path | None, "folder of photographs to paste on, else generated"] = None
    names: Annotated[Collection[str] | None, "use these object names alone"] = None
    colors: Annotated[Collection[str] | None, "use these colors alone"] = None
    word_rate: Annotated[float, "share of instruction pictures with a sign; of captions half as many"] = 0.25
    presence_first: Annotated[float, "share of instruction rows, the first ones, that ask for presence alone"] = 0.0
    splits: Annotated[Collection[str], "tests to make"] = SPLITS

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
