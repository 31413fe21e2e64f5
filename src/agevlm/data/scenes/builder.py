"""Draws pictures and training rows of the grounded scenes from a set of arguments.

Every row is drawn from its own random stream (seed, part, index), so the content does not depend on the order of
drawing or on the number of processes.
"""

import random
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from agevlm.data.rows import MAX_PHRASES
from agevlm.images import open_image

from .arguments import SceneArguments
from .compose import Picture, compose, crop_background, draw_background, encode_image, encode_mask
from .conversations import Message, caption_messages, question_messages, sample_caption
from .layout import sample_scene
from .objects import CutoutSource, IconSource, table_digest
from .questions import sample_questions
from .splits import Pool, make_pools


CAPTION_RATE = 0.2  # of the instruction rows on more than presence; without them stage 4 unlearns captions


def make_source(
    cutouts: str | Path | None, names: Collection[str] | None, colors: Collection[str] | None
) -> IconSource | CutoutSource:
    """The objects to draw: cut-outs from a folder, or icons; ValueError for unknown names and colors."""
    if cutouts is None:
        return IconSource(names, colors)
    if colors is not None:
        raise ValueError("cut-outs keep their own colors; leave out colors")
    return CutoutSource(cutouts, names)


class SceneBuilder:
    """Draws the scenes of one set of arguments; one lives in every worker process."""

    def __init__(self, arguments: SceneArguments):
        self.arguments = arguments
        self.source = make_source(arguments.cutouts, arguments.names, arguments.colors)
        self.pools = make_pools(self.source.kinds, self.source.colors)
        photos, self.backgrounds_digest = (
            _load_backgrounds(arguments.backgrounds) if arguments.backgrounds else ([], "")
        )
        # every fourth photograph is for tests alone; fewer than four cannot be divided
        self._train_photos = [p for i, p in enumerate(photos) if i % 4 or len(photos) < 4]
        self._test_photos = photos[::4]

    def stream(self, part: str, index: int) -> random.Random:
        return random.Random(f"{self.arguments.seed}/{part}/{index}")

    def background(self, rng: random.Random, pool: Pool) -> np.ndarray:
        """(size, size, 3) uint8."""
        photos = self._train_photos if pool is self.pools["train"] else self._test_photos
        size = self.arguments.size
        return crop_background(rng, rng.choice(photos), size) if photos else draw_background(rng, size)

    def picture(self, rng: random.Random, pool: Pool, *, word_rate: float, min_objects: int = 1) -> Picture:
        """A newly sampled scene of `pool`, drawn."""
        fewest = max(min_objects, self.arguments.min_objects)
        scene = sample_scene(rng, pool, fewest, max(fewest, self.arguments.max_objects), word_rate)
        return compose(rng, scene, self.source, self.arguments.size, self.background(rng, pool))

    def caption_row(self, index: int) -> tuple[dict, dict, list[dict]]:
        """(row, mask row, mask row of each phrase) of caption number `index`."""
        rng = self.stream("captions", index)
        picture = self.picture(rng, self.pools["train"], word_rate=self.arguments.word_rate / 2)
        return _captioned(f"captions-{index:07d}", rng, picture)

    def instruction_row(self, index: int) -> tuple[dict, dict | None, list[dict]]:
        """(row, mask row, mask row of each question) of instruction number `index`; by row, one question is guided,
        and none where all are about absent things. Behind the rows on presence alone, some ask for a caption."""
        rng = self.stream("instructions", index)
        pool = self.pools["train"]
        picture = self.picture(rng, pool, word_rate=self.arguments.word_rate)
        alone = index < self.arguments.presence_first * self.arguments.instructions
        name = f"instructions-{index:07d}"
        if not alone and rng.random() < CAPTION_RATE:
            return _captioned(name, rng, picture)
        questions = sample_questions(rng, picture.scene, pool, self.arguments.turns, alone)
        turns = [(number, question) for number, question in enumerate(questions) if question.look_at or question.sign]
        masks = [_mask_row(name, asked.query, 2 * turn, picture, asked.look_at, asked.sign) for turn, asked in turns]
        return (
            _row(name, picture, question_messages(rng, questions)),
            rng.choice(masks) if masks else None,
            masks[:MAX_PHRASES],
        )


def _captioned(name: str, rng: random.Random, picture: Picture) -> tuple[dict, dict, list[dict]]:
    """A row that asks for a caption, its mask row, and a mask row for each phrase."""
    caption = sample_caption(rng, picture.scene)
    guidance = _mask_row(name, caption.text, 1, picture, caption.objects)
    phrases = [
        _mask_row(name, words, 1, picture, objects) | {"occurrence": occurrence}
        for words, occurrence, objects in caption.phrases[:MAX_PHRASES]
    ]
    return _row(name, picture, caption_messages(caption)), guidance, phrases


def _row(name: str, picture: Picture, messages: list[Message]) -> dict:
    return {"id": name, "images": [encode_image(picture.image)], "messages": messages}


def _mask_row(name: str, query: str, message_index: int, picture: Picture, objects, sign: bool = False) -> dict:
    mask = picture.mask(objects, sign)
    assert mask is not None, "a guided turn has something to look at"
    told = {"id": name, "query": query, "message_index": message_index}
    return {**told, "mask": encode_mask(mask), "source": "scenes", "score": 1.0}


def _load_backgrounds(folder: str | Path) -> tuple[list[Image.Image], str]:
    """The photographs of a folder, at most 1024 pixels wide or high, and the folder's digest."""
    if not Path(folder).is_dir():
        raise ValueError(f"background folder {folder} does not exist")
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes)
    if not files:
        raise ValueError(f"no .jpg, .png or .webp picture in the background folder {folder}")
    photos = [open_image(path, where=f"background {path.name}") for path in files]
    for photo in photos:
        photo.thumbnail((1024, 1024))
    return photos, table_digest("", files)
