"""Facts of a scene: which objects stand where. Drawing adds pixels and masks; questions need the facts alone."""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from .splits import Pool
from .words import cell


SEPARATION = 0.15  # least distance of two centers, as a share of the picture, for left/right and above/below
RARE_RATE = 0.7  # of the things that can have a held-out color, in the split that tests them
_OVERLAP_RATE = 0.3
_LARGEST = (0.62, 0.5, 0.44, 0.4)  # extent of one to four objects; the smallest is _FEW_SMALLEST
_FEW_SMALLEST = 0.24
_CLUTTER = (0.14, 0.24)  # smallest and largest extent of more


@dataclass(frozen=True)
class SceneObject:
    """One object. x, y: center of its whole outline, extent: its longer side; all as shares of the picture (0 to 1).
    Later objects of a scene lie in front of earlier ones."""

    name: str
    color: str | None
    category: str
    group: str
    style: str
    x: float
    y: float
    extent: float
    angle: float = 0.0
    shade: float = 0.0

    @property
    def described(self) -> str:
        """As "red apple", or "apple" for an object that keeps its own colors."""
        return self.name if self.color is None else f"{self.color} {self.name}"


@dataclass(frozen=True)
class Scene:
    """Objects in painting order, the word on a sign (or None), and which pairs (front, back) of objects overlap."""

    objects: tuple[SceneObject, ...]
    word: str | None = None
    in_front: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def find(self, name: str, color: str | None = None) -> tuple[int, ...]:
        """Indices of the objects called `name`, where given of that color."""
        return tuple(i for i, o in enumerate(self.objects) if o.name == name and (color is None or o.color == color))

    def single(self) -> list[int]:
        """Indices of the objects whose name occurs once."""
        return [i for i, thing in enumerate(self.objects) if len(self.find(thing.name)) == 1]

    def reference(self, index: int) -> str | None:
        """The shortest description that only object `index` fits, or None where there is none."""
        thing = self.objects[index]
        if len(self.find(thing.name)) == 1:
            return thing.name
        return thing.described if thing.color and len(self.find(thing.name, thing.color)) == 1 else None


def order(a: SceneObject, b: SceneObject, axis: str) -> int:
    """-1 if `a` is clearly left of (axis "x") or above (axis "y") `b`, 1 if clearly the other way, 0 if unclear."""
    first, second = (a.x, b.x) if axis == "x" else (a.y, b.y)
    if abs(first - second) < SEPARATION or cell(first) == cell(second):
        return 0
    return -1 if first < second else 1


def sample_names(rng: random.Random, pool: Pool, count: int) -> list[str]:
    """`count` names: some repeated (for counting), often from one category, never two near synonyms."""
    names: list[str] = []
    while len(names) < count:
        if names and rng.random() < 0.25:
            names.append(rng.choice(names))
            continue
        if names and rng.random() < 0.4:
            choice = rng.choice(pool.by_category[pool.kinds[names[0]].category])
        else:
            choice = rng.choices(pool.names, cum_weights=pool.cumulative_weights)[0]
        group = pool.kinds[choice].group
        if any(pool.kinds[name].group == group and name != choice for name in names):
            continue
        names.append(choice)
    return names


def sample_color(rng: random.Random, pool: Pool, name: str, taken: Collection[str | None] = ()) -> str | None:
    """A color of a `name` that is not `taken`, mostly a held-out one where the split has some. None: there is none, or
    the things of this source have no color of their own."""
    rare = [color for color in pool.rare_colors[name] if color not in taken]
    common = [color for color in pool.colors[name] if color not in taken]
    choices = rare if rare and (rng.random() < RARE_RATE or not common) else common
    return rng.choice(choices) if choices else None


def sample_object(rng: random.Random, pool: Pool, name: str, x: float, y: float, extent: float) -> SceneObject:
    color = sample_color(rng, pool, name)
    kind = pool.kinds[name]
    angle, shade = rng.randint(-15, 15), rng.uniform(-1, 1)
    return SceneObject(
        name, color, kind.category, kind.group, rng.choice(pool.styles[name]), x, y, extent, angle, shade
    )


def sample_places(rng: random.Random, count: int) -> list[tuple[float, float, float]]:
    """(x, y, extent) of up to `count` objects that do not hide each other; some overlap a little on purpose."""
    smallest, largest = (_FEW_SMALLEST, _LARGEST[count - 1]) if count <= len(_LARGEST) else _CLUTTER
    places: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(30):
            extent = rng.uniform(smallest, largest)
            margin = extent * 0.55
            x, y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
            near = rng.random() < _OVERLAP_RATE
            closest = min((math.hypot(x - u, y - v) / (extent + e) for u, v, e in places), default=1.0)
            if closest > (0.32 if near else 0.55):
                places.append((x, y, extent))
                break
    return places


def sample_scene(rng: random.Random, pool: Pool, min_objects: int, max_objects: int, word_rate: float) -> Scene:
    places = sample_places(rng, rng.randint(min_objects, max_objects))
    names = sample_names(rng, pool, len(places))
    objects = tuple(sample_object(rng, pool, name, *place) for name, place in zip(names, places, strict=True))
    word = rng.choice(pool.words) if rng.random() < word_rate else None
    return Scene(objects, word, estimate_in_front(objects))


def estimate_in_front(objects: Sequence[SceneObject]) -> frozenset[tuple[int, int]]:
    """Overlapping pairs by distance, for scenes that are described and not drawn."""
    return frozenset(
        (front, back)
        for front in range(len(objects))
        for back in range(front)
        if math.hypot(objects[front].x - objects[back].x, objects[front].y - objects[back].y)
        < 0.42 * (objects[front].extent + objects[back].extent)
    )


def keep(scene: Scene, kept: Sequence[int]) -> Scene:
    """The scene with only the objects `kept` (indices in painting order)."""
    place = {old: new for new, old in enumerate(kept)}
    pairs = frozenset((place[a], place[b]) for a, b in scene.in_front if a in place and b in place)
    return replace(scene, objects=tuple(scene.objects[i] for i in kept), in_front=pairs)
