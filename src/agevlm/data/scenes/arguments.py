"""The arguments that decide the content of a folder of scenes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SceneArguments:
    """Everything that decides the content of a folder of scenes."""

    captions: int = 20_000
    instructions: int = 10_000
    test: int = 500
    size: int = 224
    max_objects: int = 4
    turns: int = 4
    seed: int = 0
    cutouts: str | None = None
    backgrounds: str | None = None
    names: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None
    word_rate: float = 0.25

    def __post_init__(self):
        for field, least in (("captions", 0), ("instructions", 0), ("test", 0), ("size", 64), ("turns", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; use at least {least}")
        if not 1 <= self.max_objects <= 4:
            raise ValueError(f"max_objects is {self.max_objects}; use 1 to 4")
        if not 0 <= self.word_rate <= 1:
            raise ValueError(f"word_rate is {self.word_rate}; use 0 to 1")
