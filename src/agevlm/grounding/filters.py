"""The filters of masks: every reason to reject a mask, and a fixed number of the rest.

Filters read the measurements of a run and need neither pictures nor models, so other thresholds take moments. The
paper keeps 77K masks of captions and 150K of instructions and names no criterion; these filters reject masks that are
useless to Eq. 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .regions import GROUNDED


KEPT = "kept"
TOO_SMALL, NEARLY_ALL, LOW_SCORE, EMPTY_ON_GRID = "too_small", "nearly_all", "low_score", "empty_on_grid"
NOT_NEEDED = "not_needed"


@dataclass(frozen=True)
class Filters:
    """Thresholds.

    Args:
        min_area, max_area: share of the picture that a mask must, and may at most, cover.
        min_score: the segmenter's own estimate; masks without one pass.
        min_cells: cells of the model's grid that a mask must take, 0 asks for none. `mask_to_grid` leaves a small
            object its best cell, so 1 refuses only what a cropping geometry cuts away.
        keep: how many masks to keep at most, chosen by a hash of the row's id and `seed`: a smaller number keeps a
            subset of a larger one. None keeps all.
    """

    min_area: float = 0.001
    max_area: float = 0.95
    min_score: float = 0.5
    min_cells: int = 1
    keep: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise ValueError(f"areas from {self.min_area} to {self.max_area}; use 0 <= min <= max <= 1")
        if self.keep is not None and self.keep < 0:
            raise ValueError(f"`keep` is {self.keep}; use a number of masks, 0 or more")

    def status(self, outcome: str, area: float | None, score: float | None, cells: int | None) -> str:
        """The status of one row: its failure, the first reason against its mask, or KEPT."""
        if outcome != GROUNDED or area is None:
            return outcome
        if area < self.min_area:
            return TOO_SMALL
        if area > self.max_area:
            return NEARLY_ALL
        if score is not None and score < self.min_score:
            return LOW_SCORE
        if cells is not None and cells < self.min_cells:
            return EMPTY_ON_GRID
        return KEPT

    def beyond_quota(self, kept_ids: Iterable[str]) -> set[str]:
        """Which of the rows that passed are over the number to keep."""
        ids: list[str] = list(kept_ids)
        if self.keep is None or len(ids) <= self.keep:
            return set()
        from agevlm.data.masks import subset_hash  # brings `datasets`, which the help of `agevlm ground` does without

        hashed = sorted((subset_hash(row_id, self.seed), row_id) for row_id in ids)
        return {row_id for _, row_id in hashed[self.keep :]}
