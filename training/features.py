"""Stored features: where the vision tower does not train, its output for each picture is computed once and then read.

Equal steps. The last bits of a kernel's result for one picture depend on how many pictures are in its call: a picture
alone differs by 1e-5 from the same one among others (tiny tower, 224 pixels, CPU). So a frozen tower always
runs in one layout (`fix_layout`), whether its output is stored or not: `per_device_train_batch_size` pictures a call,
blank ones after the last. That is the call of a full batch with a picture in each row, which costs nothing. A run
that reads ends with the weights of one that computes, bit for bit, on the same machine with the same libraries.

In a batch, features `(B, N, 1, L, C)` stand in the place of `pixel_values (B, N, 3, height, width)`: the one channel
tells them from pictures (`are_features`). The model casts and counts them as it does pictures, and the tower passes
them on.

A store is a folder whose name is a digest of the inputs that decide the bits: tower, image processor, layout, type,
libraries, device. It is shared by all runs with these, whatever rows they have: a picture is found by the digest of
its file. Each process adds to a part of its own, two files that only grow; the torn end that a kill leaves is cut off.
Reading keeps nothing in memory but 24 bytes a picture.
"""

import copy
import io
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from agevlm.images import open_image, stored_bytes
from agevlm.processing import AgeVlmProcessor
from agevlm.processing.image_processing_agevlm import checked_fit, visible_cells
from agevlm.progress import Bar
from agevlm.store import Journal, as_json, claim, digest, locked, write_text
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.lineage import data_fingerprint, identity_hash, model_fingerprint
from agevlm.training.stages.recipe import TWINS, StageRecipe


IDENTITY, PICTURES, FEATURES = "store.json", "pictures.bin", "features.bin"
PICTURE = np.dtype([("digest", "<u8", 2), ("size", "<i4", 2)])  # size: height, width
FLUSH_BYTES = 64 * 2**20


def why_not(recipe: StageRecipe, args: AgeVlmSFTConfig, adapters: bool = False) -> str | None:
    """Why a stage cannot train on stored features, None where it can.

    Args:
        adapters: the language model's adapters train in place of `recipe.trains`, which leaves the tower frozen.
    """
    moving = [part for part in recipe.trains if part.startswith("vision")]
    if moving and not adapters:
        return f"{recipe.name} trains the vision tower ({', '.join(moving)}), whose output changes at every step"
    if recipe.variant in TWINS:
        return f"the concatenating twin (`--variant {recipe.variant}`) has a collator of its own, which opens pictures"
    if args.is_sharded:
        return "FSDP and DeepSpeed divide the vision tower, which then has no layout to rely on"
    if args.torch_compile:
        return "`torch_compile` makes kernels of its own for the vision tower, whose last bits differ"
    return None


def are_features(pixel_values: torch.Tensor) -> bool:
    """Whether what stands in the place of pictures is the tower's output, of one channel."""
    return pixel_values.shape[-3] == 1


def fix_layout(tower: nn.Module, pictures: int) -> None:
    """Let a frozen tower run on exactly so many pictures a call, and pass stored features on.

    It runs in eval mode and without gradients. `del tower.forward` takes it back.
    """
    compute = tower.forward

    @torch.no_grad()
    def forward(pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        if are_features(pixel_values):
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values[:, 0])
        tower.eval()
        states = []
        for part in pixel_values.split(pictures):
            blank = part.new_zeros(pictures - len(part), *part.shape[1:])
            states.append(compute(torch.cat([part, blank])).last_hidden_state[: len(part)])
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(states))

    tower.forward = forward  # type: ignore[method-assign]


def picture_key(image: Any) -> np.ndarray:
    """By which a picture is found, as a row holds it: digest of its file, two numbers."""
    return np.frombuffer(bytes.fromhex(digest(stored_bytes(image))), "<u8")


class StoredPicture(Image.Image):
    """A picture of which the size is known and the features are stored; it has no pixels."""

    def __init__(self, size: tuple[int, int], place: int):
        super().__init__()
        self._size, self._mode, self.place = size, "RGB", place


class FeatureStore:
    """The features of pictures in a folder, see the file's docstring.

    Args:
        root: folder of stores; this one's is made in it.
        identity: JSON-ready, all that decides the bits.
        shape: (cells, width) of a picture's features.
        dtype: in which they are stored.
    """

    def __init__(self, root: str | Path, identity: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype):
        identity = as_json({**identity, "shape": shape, "dtype": str(dtype)})
        self.folder = Path(root) / identity_hash(identity)
        self.shape, self.dtype = shape, dtype
        self.picture_bytes = shape[0] * shape[1] * dtype.itemsize
        with locked(self.folder):
            claim(self.folder / IDENTITY, identity, "store of features")
        self.refresh()

    def refresh(self) -> None:
        """Find the stored pictures."""
        self._parts = sorted(path.parent for path in self.folder.glob(f"*/{PICTURES}"))
        known = []
        for part in self._parts:
            whole = (part / PICTURES).stat().st_size // PICTURE.itemsize
            known.append(np.fromfile(part / PICTURES, PICTURE, whole))
        self._starts = np.cumsum([0, *map(len, known)])
        pictures = np.concatenate([np.zeros(0, PICTURE), *known])
        self._order = np.argsort(pictures["digest"][:, 0], kind="stable")
        self._sizes = pictures["size"]
        # Two arrays, because a search copies a column of one.
        self._firsts, self._seconds = np.ascontiguousarray(pictures["digest"][self._order].T)
        self._files: dict[int, io.FileIO] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}  # opened in the process that reads

    # ---- Reading ----

    def find(self, key: np.ndarray) -> int | None:
        """The place of a picture, None where its features are not stored."""
        found = int(np.searchsorted(self._firsts, key[0]))
        known = found < len(self) and (self._firsts[found], self._seconds[found]) == tuple(key)
        return int(self._order[found]) if known else None

    def open(self, image: Any, where: str) -> StoredPicture:
        """In the place of `open_image`.

        Raises:
            ValueError: `open_image` refuses the picture.
            RuntimeError: it does not, and yet there are no features of it.
        """
        place = self.find(picture_key(image))
        if place is not None:
            height, width = self._sizes[place].tolist()
            return StoredPicture((width, height), place)
        open_image(image, where)
        raise RuntimeError(
            f"{where}: {self.folder} has no features of the picture, though all of these rows were stored. The rows "
            f"have changed. Delete the files without a suffix in {self.folder} and run the same command again."
        )

    def read(self, places: Sequence[int]) -> torch.Tensor:
        """Features `(len(places), 1, L, C)`.

        Raises:
            ValueError: a file is shorter than it was.
        """
        values = np.empty((len(places), self.picture_bytes), np.uint8)
        for value, place in zip(values, places, strict=True):
            part = int(np.searchsorted(self._starts, place, side="right")) - 1
            path = self._parts[part] / FEATURES
            if part not in self._files:
                self._files[part] = path.open("rb", buffering=0)
            start = (place - int(self._starts[part])) * self.picture_bytes
            # Not mapped into memory: what is read from a map counts as the process's own.
            if os.preadv(self._files[part].fileno(), [value.data], start) != self.picture_bytes:
                raise ValueError(f"{path} is damaged: it ends before picture {place}. Delete {self.folder}.")
        return torch.from_numpy(values).view(self.dtype).view(len(places), 1, *self.shape)

    def reading(self, processor: AgeVlmProcessor) -> AgeVlmProcessor:
        """The processor with features in the place of pixels, for pictures that `open` has opened."""
        reader = copy.copy(processor)
        reader.image_processor = _FeatureProcessor(self, processor.image_processor)
        return reader

    # ---- Storing ----

    def fill(
        self,
        rows: Any,
        images: Any,
        compute: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int,
        workers: int,
        share: tuple[int, int],
    ) -> None:
        """Store this process's share of the pictures of `rows` that are not there; others wait for its part.

        Pictures that cannot be opened are passed over: whoever trains on their row says so.

        Args:
            images: the image processor.
            compute: its pixels `(m, 3, height, width)` uint8 to features `(m, L, C)`.
            share: number of this process, and of all.
        """
        number, processes = share
        mine = Subset(rows, range(len(rows) * number // processes, len(rows) * (number + 1) // processes))
        with locked(self.folder / f"part-{number:05}") as part:
            sizes = {part / PICTURES: PICTURE.itemsize, part / FEATURES: self.picture_bytes}
            whole = min(path.stat().st_size // size if path.exists() else 0 for path, size in sizes.items())
            with (
                Journal(part / PICTURES, lambda path: whole * sizes[path]) as pictures,
                Journal(part / FEATURES, lambda path: whole * sizes[path]) as features,
            ):
                self.refresh()
                loader: DataLoader = DataLoader(
                    mine,  # type: ignore[arg-type]
                    batch_size,
                    num_workers=workers,
                    collate_fn=_Missing(self, images),
                    generator=torch.Generator(),  # the process's own goes on to dropout as it would without a store
                )
                bar = Bar(loader, desc="stored features", unit="batch", disable=number > 0)
                for records, values in _blocks(self._computed(bar, compute)):
                    features.write(values.view(torch.uint8).numpy().tobytes())
                    pictures.write(records.tobytes())

    def _computed(self, loader: Any, compute: Callable) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Each picture once: (record, features), a few at a time."""
        seen: set[bytes] = set()
        for records, pixels in loader:
            places = {record["digest"].tobytes(): place for place, record in enumerate(records)}
            fresh = [place for key, place in places.items() if key not in seen]
            seen |= places.keys()
            if fresh:
                yield records[fresh], compute(pixels[fresh]).to(self.dtype).cpu()


def _blocks(pieces: Iterator[tuple[np.ndarray, torch.Tensor]]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Pieces joined to blocks of `FLUSH_BYTES` or a little more."""
    records: list[np.ndarray] = []
    values: list[torch.Tensor] = []
    for record, value in pieces:
        records.append(record)
        values.append(value)
        if sum(part.nbytes for part in values) >= FLUSH_BYTES:
            yield np.concatenate(records), torch.cat(values)
            records, values = [], []
    if values:
        yield np.concatenate(records), torch.cat(values)


class _Missing:
    """Opens the pictures of rows that a store does not have: (records, pixels)."""

    def __init__(self, store: FeatureStore, images: Any):
        self.store, self.images = store, images

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[np.ndarray, torch.Tensor | None]:
        opened, records = [], []
        for row in rows:
            for image in row["images"] or ():
                key = picture_key(image)
                if self.store.find(key) is None:
                    with suppress(ValueError):
                        picture = open_image(image, "a picture")
                        opened.append(picture)
                        records.append((key, (picture.height, picture.width)))
        if not opened:
            return np.array(records, PICTURE), None
        pixels = self.images(opened, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        return np.array(records, PICTURE), pixels


class _FeatureProcessor:
    """An image processor of `StoredPicture`s: their features, and which of their cells show picture."""

    def __init__(self, store: FeatureStore, image_processor: Any):
        self.store, self.image_processor = store, image_processor
        self.mask_to_grid = image_processor.mask_to_grid

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: list[StoredPicture], **_: Any) -> BatchFeature:
        usual = self.image_processor
        canvas = (usual.size["height"], usual.size["width"])
        fits = [checked_fit((i.height, i.width), canvas, usual.geometry, usual.do_resize) for i in images]
        features = self.store.read([image.place for image in images])
        return BatchFeature(
            {"pixel_values": features, "visual_token_mask": visible_cells(fits, canvas, usual.cell_size)}
        )


def use_stored_features(trainer: Any, root: str | Path, say: Callable[[str], None]) -> None:
    """Let an `AgeVlmSFTTrainer` train on stored features: those that `root` lacks are stored first.

    All processes call it, before training.

    Args:
        say: gets one line before pictures are stored.

    Raises:
        ValueError: the tower trains or is sharded, or the disk is too small.
    """
    args, collator, tower = trainer.args, trainer.data_collator, trainer.frozen_tower
    if tower is None:
        raise ValueError("Features are stored of a frozen vision tower, and this one trains or is sharded.")
    usual = collator.processor.image_processor
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    identity = {
        "tower": model_fingerprint(tower),
        "settings": {name: getattr(tower.config, name) for name in ("hidden_act", "layer_norm_eps")},
        "images": {"backend": type(usual).__name__, **json.loads(usual.to_json_string())},
        "pictures_per_call": args.per_device_train_batch_size,
        "libraries": {library.__name__: library.__version__ for library in (torch, transformers, PIL)},
        "device": torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    shape = (usual.grid[0] * usual.grid[1], tower.config.hidden_sizes[-1])
    # Under autocast the projector would round to that type what it is given; nothing else reads it.
    store = FeatureStore(root, identity, shape, mixed or tower.dtype)

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return tower(collator.normalized(pixels.to(args.device)).to(tower.dtype)).last_hidden_state

    held = trainer.eval_dataset
    for rows in (trainer.train_dataset, *(held.values() if isinstance(held, dict) else [held])):
        if rows is None or (done := store.folder / data_fingerprint(rows)["fingerprint"]).exists():
            continue
        most, least = (max(n, 0) * store.picture_bytes for n in (len(rows), len(rows) - len(store)))
        free = shutil.disk_usage(store.folder).free
        say(
            f"The vision tower's output for {len(rows):,} rows is stored in {store.folder}: "
            f"{store.picture_bytes:,} bytes a picture, up to {most / 1e9:.2f} GB; {free / 1e9:.0f} GB are free."
        )
        if least > free:
            raise ValueError(
                f"{root} has {free / 1e9:.1f} GB free and stored features take {least / 1e9:.1f} GB or more "
                f"({store.picture_bytes:,} bytes a picture). Choose a larger disk, or leave `--stored-features` out."
            )
        share = (args.process_index, args.world_size)
        store.fill(rows, usual, compute, args.per_device_train_batch_size, args.dataloader_num_workers, share)
        trainer.accelerator.wait_for_everyone()
        store.refresh()
        if args.should_save:
            write_text(done, "")
    collator.features = store
