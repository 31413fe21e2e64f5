"""The choices of a run: backends with their checkpoints, and texts to ground. Nothing heavy is imported here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """One model of a backend.

    Attributes:
        model: name of its class in `models.py`.
        checkpoint: the repository it comes from by default.
        options: arguments of the class that belong to the name.
    """

    model: str
    checkpoint: str
    options: Mapping[str, Any] = field(default_factory=dict)


# A new backend is a class in `models.py` and a line here. Any grounder goes with any segmenter.
GROUNDERS = {
    "florence2": Published("Florence2", "florence-community/Florence-2-large"),
    "florence2-phrases": Published("Florence2", "florence-community/Florence-2-large", {"phrases": True}),
    "grounding-dino": Published("GroundingDino", "IDEA-Research/grounding-dino-base"),
}
SEGMENTERS = {
    "sam2": Published("Sam2", "facebook/sam2.1-hiera-large"),
    "sam": Published("Sam", "facebook/sam-vit-huge"),
}
ONE_STEP = {"sam3": Published("Sam3", "facebook/sam3")}
BY_PHRASE = ("florence2-phrases", "grounding-dino", "exact")  # they tell which words a box belongs to


def names() -> list[str]:
    """All backends, the default first; `exact` has no models (`Exact`)."""
    return [*(f"{first}+{second}" for first in GROUNDERS for second in SEGMENTERS), *ONE_STEP, "exact"]


QUERY_SOURCES = ("caption", "question", "question+answer")
