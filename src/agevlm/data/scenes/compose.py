"""Draws a scene: background, objects in painting order, a sign; and the visible mask of each.

Masks come from one owner map: each pixel belongs to the last thing painted there, so visible masks are disjoint by
construction. Objects of which more than `MAX_HIDDEN` is covered are left out before anything is painted.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agevlm.images import stored

from .layout import Scene, keep
from .objects import CutoutSource, IconSource, Sprite, rgb


MAX_HIDDEN = 0.6
_IN_FRONT = 0.06  # least share of an object another must cover to lie clearly in front of it
_BACKGROUND, _SIGN = -1, 100
_SIGN_COLORS = (((250, 250, 245), (20, 20, 20)), ((30, 30, 34), (245, 245, 245)))


@dataclass(frozen=True)
class Picture:
    """A drawn scene: RGB `image`, and `owner` (H, W) int8: index of the object a pixel shows, 100 sign, -1 nothing."""

    image: Image.Image
    owner: np.ndarray
    scene: Scene

    def mask(self, objects: Sequence[int], sign: bool = False) -> Image.Image | None:
        """1-bit mask of the visible parts of these objects (and the sign); None if there is nothing to look at."""
        if not objects and not sign:
            return None
        wanted = [*objects, _SIGN] if sign else list(objects)
        return Image.fromarray(np.logical_or.reduce([self.owner == index for index in wanted]))


@lru_cache(maxsize=4)
def _noise(size: int) -> np.ndarray:
    """One tile of noise, cropped at random places; drawing fresh noise per picture would double the drawing time."""
    return np.random.default_rng(0).normal(0, 1, (2 * size, 2 * size, 1)).astype(np.float32)


def _muted(rng: random.Random) -> tuple[int, int, int]:
    """A grayish color of middle brightness: the named object colors all stand out from it."""
    level = rng.randint(95, 190)
    return rgb(level + rng.randint(-14, 14) for _ in range(3))


def draw_background(rng: random.Random, size: int) -> np.ndarray:
    """Smooth gradient, sometimes stripes, always a little noise: (size, size, 3) uint8."""
    cells = rng.choice((2, 2, 3, 5))
    base = _muted(rng)
    spread = rng.randint(4, 26)
    values = bytearray()
    for _ in range(cells * cells):
        light = rng.randint(-spread, spread)
        values += bytes(value + light + rng.randint(-5, 5) for value in base)
    image = Image.frombytes("RGB", (cells, cells), bytes(values)).resize((size, size), Image.Resampling.BICUBIC)
    canvas: np.ndarray = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.3:
        across, down = rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)
        grid = np.arange(size, dtype=np.float32) * (224 / size)
        wave = np.sin(across * grid[None, :] + down * grid[:, None] + rng.uniform(0, 6))
        canvas = canvas + (rng.randint(4, 14) * wave)[:, :, None]
    top, left = rng.randrange(size), rng.randrange(size)
    canvas = canvas + rng.uniform(1, 7) * _noise(size)[top : top + size, left : left + size]
    return np.clip(canvas, 0, 255).astype(np.uint8)


def crop_background(rng: random.Random, photo: Image.Image, size: int) -> np.ndarray:
    """A random square of a photograph, shrunk to `size`."""
    side = rng.randint(min(photo.size) // 2, min(photo.size))
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)))


_sign_font = lru_cache(maxsize=32)(ImageFont.load_default)


def draw_sign(rng: random.Random, word: str, size: int) -> Image.Image:
    """A small board with `word` on it (RGB)."""
    paper, ink = rng.choice(_SIGN_COLORS)
    font = _sign_font(max(8, round(size * rng.uniform(0.09, 0.13))))
    left, top, right, bottom = map(int, font.getbbox(word))
    pad = max(3, size // 40)
    board = Image.new("RGB", (right - left + 2 * pad, bottom - top + 2 * pad), paper)
    ImageDraw.Draw(board).text((pad - left, pad - top), word, font=font, fill=ink)
    return board


def _claim(
    owner: np.ndarray, sprites: Sequence[tuple[Sprite, int, int]], sign_box: tuple[int, ...] | None
) -> np.ndarray:
    owner[:] = _BACKGROUND
    for index, (sprite, x, y) in enumerate(sprites):
        owner[y : y + sprite.side, x : x + sprite.side][sprite.alpha] = index
    if sign_box is not None:
        x, y, width, height = sign_box
        owner[y : y + height, x : x + width] = _SIGN
    return owner


def _place_sign(rng: random.Random, board: Image.Image, sprites: Sequence[tuple[Sprite, int, int]], size: int):
    """(x, y, width, height) of the least covering of a few random places, in pixels."""

    def overlap(x: int, y: int) -> int:
        return sum(
            max(0, min(x + board.width, u + s.side) - max(x, u))
            * max(0, min(y + board.height, v + s.side) - max(y, v))
            for s, u, v in sprites
        )

    places = [(rng.randint(0, size - board.width), rng.randint(0, size - board.height)) for _ in range(8)]
    return (*min(places, key=lambda place: overlap(*place)), board.width, board.height)


def compose(
    rng: random.Random,
    scene: Scene,
    source: IconSource | CutoutSource,
    size: int,
    background: np.ndarray,
) -> Picture:
    """Paints `scene` (`size` x `size`) on a copy of `background` (size, size, 3) uint8.

    The returned picture's scene has the final positions, the truly overlapping pairs, and lacks objects that would
    have been hidden.
    """
    sprites, objects = [], []
    for thing in scene.objects:
        sprite = source.draw(
            thing.name, thing.style, thing.color, round(thing.extent * size), thing.angle, thing.shade
        )
        x, y = (min(size - sprite.side, max(0, round(c * size - sprite.side / 2))) for c in (thing.x, thing.y))
        sprites.append((sprite, x, y))
        rows, cols = np.flatnonzero(sprite.alpha.any(1)), np.flatnonzero(sprite.alpha.any(0))
        center_x, center_y = x + (cols[0] + cols[-1] + 1) / 2, y + (rows[0] + rows[-1] + 1) / 2
        objects.append(replace(thing, x=center_x / size, y=center_y / size))
    board = draw_sign(rng, scene.word, size) if scene.word else None
    sign_box = _place_sign(rng, board, sprites, size) if board else None
    owner = np.empty((size, size), np.int8)
    kept = list(range(len(sprites)))
    while True:  # leaving one out can only uncover others
        now = [sprites[i] for i in kept]
        visible = np.bincount(_claim(owner, now, sign_box).ravel() + 1, minlength=_SIGN + 2)
        hidden = [1 - visible[index + 1] / int(sprite.alpha.sum()) for index, (sprite, *_) in enumerate(now)]
        worst = max(range(len(now)), key=hidden.__getitem__)
        if hidden[worst] <= MAX_HIDDEN:
            break
        if len(kept) == 1:  # only the sign can cover it
            board, sign_box, scene = None, None, replace(scene, word=None)
        else:
            del kept[worst]
    scene = keep(replace(scene, objects=tuple(objects), in_front=frozenset()), kept)
    scene = replace(scene, in_front=_true_in_front(now))
    canvas = Image.fromarray(background.copy())
    for sprite, x, y in now:
        for color, layer in sprite.layers:
            box = (x, y, x + sprite.side, y + sprite.side)
            canvas.paste(color, box if isinstance(color, tuple) else (x, y), layer)
    if board is not None and sign_box is not None:
        canvas.paste(board, sign_box[:2])
    return Picture(canvas, owner, scene)


def _true_in_front(sprites: Sequence[tuple[Sprite, int, int]]) -> frozenset[tuple[int, int]]:
    pairs = set()
    for front, (a, ax, ay) in enumerate(sprites):
        for back, (b, bx, by) in enumerate(sprites[:front]):
            left, top = max(ax, bx), max(ay, by)
            right, bottom = min(ax + a.side, bx + b.side), min(ay + a.side, by + b.side)
            if left < right and top < bottom:
                both = (
                    a.alpha[top - ay : bottom - ay, left - ax : right - ax]
                    & (b.alpha[top - by : bottom - by, left - bx : right - bx])
                )
                if both.sum() >= _IN_FRONT * b.alpha.sum():
                    pairs.add((front, back))
    return frozenset(pairs)


encode_image = partial(stored, kind="JPEG", quality=90)
encode_mask = partial(stored, compress_level=1)
