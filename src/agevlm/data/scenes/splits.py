"""What may appear where: held-out names, (color, name) pairs and styles of the grounded scenes.

Three tests of generalization, each excluded from every training picture, question and caption:
 - `composition`: about a tenth of all (color, name) pairs;
 - `name`: about a tenth of the names;
 - `style`: one style (icon font, or drawing versus photograph) of every name that has at least two.
Membership is decided by a hash of the item alone, so it does not change with the seed or the number of pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from agevlm.store import digest

from .objects import Kind
from .words import SIGN_WORDS


HELD_OUT = 0.1
_ALWAYS_TEST = "photo"  # a photographic style is the unseen one wherever a name also has drawings
_POPULAR = 15


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` only: blake2b(parts joined by "/") / 2^64."""
    return int(digest("/".join(map(str, parts)), size=8), 16) / 2**64


def is_held_out_pair(color: str | None, name: str) -> bool:
    return color is not None and unit_hash("pair", color, name) < HELD_OUT


@dataclass(frozen=True)
class Pool:
    """The things, colors and styles that one split draws. Names are ordered from most to least frequent."""

    kinds: Mapping[str, Kind]
    names: tuple[str, ...]
    styles: Mapping[str, tuple[str, ...]]
    colors: Mapping[str, tuple[str | None, ...]]
    rare_colors: Mapping[str, tuple[str, ...]]  # held-out colors of a name, used for most test objects that have one
    words: tuple[str, ...]

    @cached_property
    def cumulative_weights(self) -> tuple[float, ...]:
        """Frequencies fall off slowly with the rank, so that "popular" negatives mean something."""
        return tuple(accumulate(1 / (1 + 2 * rank / max(1, len(self.names))) for rank in range(len(self.names))))

    @cached_property
    def popular(self) -> tuple[str, ...]:
        return self.names[: min(_POPULAR, max(1, len(self.names) // 3))]

    @cached_property
    def by_category(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(self.kinds[name].category, []).append(name)
        return {category: tuple(names) for category, names in found.items()}

    def allowed(self, color: str, name: str) -> bool:
        """Whether a question of this split may speak of a `color` `name`."""
        return color in self.colors[name] or color in self.rare_colors[name]


def held_out_names(kinds: Mapping[str, Kind]) -> tuple[str, ...]:
    order = sorted(kinds, key=lambda name: unit_hash("name", name))
    return tuple(sorted(order[: max(2, round(HELD_OUT * len(kinds)))]))


def held_out_style(kind: Kind) -> str | None:
    if len(kind.styles) < 2:
        return None
    if _ALWAYS_TEST in kind.styles:
        return _ALWAYS_TEST
    return min(kind.styles, key=lambda style: unit_hash("style", style, kind.name))


def make_pools(kinds: Mapping[str, Kind], colors: Sequence[str]) -> dict[str, Pool]:
    """Pools "train", "composition", "name", "style" and "text" (training plus the held-out names, for words alone)."""
    if len(kinds) < 6:
        raise ValueError(f"scenes need at least 6 object names to hold some out, got {len(kinds)}: {sorted(kinds)}")
    unseen = set(held_out_names(kinds))
    order = sorted(kinds, key=lambda name: unit_hash("frequency", name))
    tests = {name: held_out_style(kind) for name, kind in kinds.items()}
    common: dict[str, tuple[str | None, ...]] = {n: (None,) for n in order}
    if colors:
        common = {n: tuple(c for c in colors if not is_held_out_pair(c, n)) for n in order}
        order = [n for n in order if common[n]]  # with few colors a name may be left without any
    seen = [name for name in order if name not in unseen]
    rare = {n: tuple(c for c in colors if is_held_out_pair(c, n)) for n in order}
    none: dict[str, tuple[str, ...]] = {n: () for n in order}
    train_styles = {n: tuple(s for s in kinds[n].styles if s != tests[n]) for n in order}
    test_words = tuple(word for word in SIGN_WORDS if unit_hash("word", word) < HELD_OUT)
    words = tuple(word for word in SIGN_WORDS if word not in test_words)
    new_style = {n: (s,) for n, s in tests.items() if s is not None}
    all_styles = {n: kinds[n].styles for n in order}

    def pool(names, styles, rare_colors, sign_words):
        return Pool(kinds, tuple(names), styles, common, rare_colors, sign_words)

    return {
        "train": pool(seen, train_styles, none, words),
        "composition": pool(seen, train_styles, rare, words),
        "name": pool([n for n in order if n in unseen], all_styles, none, test_words),
        "style": pool([n for n in seen if n in new_style], new_style, none, words),
        "text": pool(order, all_styles, none, words),
    }
