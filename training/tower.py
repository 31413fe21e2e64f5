"""The pretrained vision tower of the sizes `tiny` and `small`: a ConvNeXt whose cells name what they show.

The paper's tower is CLIP's, whose patches name what they show (section 4). Ours learns it on drawn scenes: every cell
names its thing, its color and its place in the picture. A tower that learned from pooled cells of whole objects named
half of the things from one cell, and no model on top of it answered better than that allows (docs/LOG.md).

The head is thrown away. `cell_accuracy` measures what a new linear head can read from one cell.
"""

import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import ConvNextModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from agevlm.data.scenes.builder import SceneArguments, SceneBuilder
from agevlm.modeling_agevlm import AgeVlmConfig
from agevlm.processing import AgeVlmProcessor

from .step_bar import use_step_bar


HUE_SHIFTED = 0.4  # share of the pictures whose colors are turned: a name must not hang on a color
NOTHING_WEIGHT = 0.3  # of a cell of the background, which most are
COLOR_WEIGHT, PLACE_WEIGHT = 0.5, 0.2


class Cells(torch.utils.data.Dataset):
    """Scenes drawn on demand: row `index` is a picture and what each of its cells shows."""

    def __init__(self, arguments: SceneArguments, length: int, processor: AgeVlmProcessor, pool: str = "train"):
        self.builder, self.length = SceneBuilder(arguments), length
        self.processor, self.pool = processor.image_processor, self.builder.pools[pool]
        self.names, self.colors = sorted(self.builder.source.kinds), list(self.builder.source.colors)
        self.hue_shifted = HUE_SHIFTED if pool == "train" else 0.0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        """`image`; `names` and `colors`, int64 (rows x columns,): places in the lists of that name, one past the end
        for the background, -100 for a color that was changed."""
        builder = self.builder
        rng = builder.stream(f"cells-{self.pool.names[0]}", index)
        picture = builder.picture(rng, self.pool, word_rate=0.0)
        image, shifted = picture.image, bool(self.colors) and rng.random() < self.hue_shifted
        if shifted:
            image = _turn_hue(image, rng)
        rows, columns = self.processor.grid
        names = np.full(rows * columns, len(self.names))
        colors = np.full(rows * columns, len(self.colors))
        for number, thing in enumerate(picture.scene.objects):
            cells = self.processor.mask_to_grid(picture.mask([number])).ravel()
            names[cells] = self.names.index(thing.name)
            colors[cells] = -100 if shifted or thing.color is None else self.colors.index(thing.color)
        return {"image": image, "names": torch.from_numpy(names), "colors": torch.from_numpy(colors)}

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values (B, 3, H, W)`, `names` and `colors (B, L)`."""
        images = self.processor([row["image"] for row in rows], return_tensors="pt")
        labels = {key: torch.stack([row[key] for row in rows]) for key in ("names", "colors")}
        return {"pixel_values": images["pixel_values"], **labels}


def _turn_hue(image: Image.Image, rng: random.Random) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turn = rng.randrange(256)
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class CellReader(nn.Module):
    """A ConvNeXt and a linear head on each of its cells: the thing, its color, and where the cell is."""

    def __init__(self, vision: ConvNextModel, names: int, colors: int):
        super().__init__()
        width = vision.config.hidden_sizes[-1]
        self.vision = vision
        self.sizes = (names + 1, colors + 1, 2)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes)))

    def forward(self, pixel_values, names, colors) -> dict[str, torch.Tensor]:
        """What `Cells.collate` makes -> the loss."""
        features = self.vision(pixel_values).last_hidden_state  # (B, width, rows, columns)
        rows, columns = features.shape[-2:]
        name, color, place = self.head(features.flatten(2).transpose(1, 2)).split(self.sizes, dim=-1)
        weights = torch.ones(self.sizes[0], device=name.device)
        weights[-1] = NOTHING_WEIGHT
        across, down = torch.linspace(-1, 1, columns), torch.linspace(-1, 1, rows)
        target = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).flatten(0, 1).to(place)
        loss = (
            functional.cross_entropy(name.flatten(0, 1), names.flatten(), weights)
            + COLOR_WEIGHT * functional.cross_entropy(color.flatten(0, 1), colors.flatten())
            + PLACE_WEIGHT * functional.mse_loss(place, target.expand_as(place))
        )
        return {"loss": loss}


def train_cells(
    config: AgeVlmConfig, processor: AgeVlmProcessor, scenes: SceneArguments, number: int, args: TrainingArguments
) -> ConvNextModel:
    """A ConvNeXt of `config.vision_config` trained on `number` pictures; goes on in `args.output_dir`."""
    set_seed(args.seed)
    data = Cells(scenes, number, processor)
    model = CellReader(ConvNextModel(config.vision_config), len(data.names), len(data.colors))
    trainer = Trainer(model, args=args, data_collator=data.collate, train_dataset=data)
    use_step_bar(trainer, "vision tower")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))
    return model.vision


@torch.no_grad()
def _cells(vision: ConvNextModel, data: Cells) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features (cells, width) and labels (cells,) of all cells of `data`."""
    features: list[torch.Tensor] = []
    labels: dict[str, list[torch.Tensor]] = {"names": [], "colors": []}
    for first in range(0, len(data), 50):
        batch = data.collate([data[index] for index in range(first, min(first + 50, len(data)))])
        features.append(vision.eval()(batch.pop("pixel_values")).last_hidden_state.flatten(2).transpose(1, 2))
        for key, value in labels.items():
            value.append(batch[key])
    return torch.cat(features).flatten(0, 1), {key: torch.cat(value).flatten() for key, value in labels.items()}


def cell_accuracy(
    vision: ConvNextModel, processor: AgeVlmProcessor, scenes: SceneArguments, pictures: int = 600
) -> dict[str, float]:
    """Share of the things' cells whose name (`name`) and color (`color`) a linear classifier reads right.

    The classifier is fitted to `pictures` training scenes and tested on a third as many of the unseen color and name
    pairs; each of a seed of its own, so that the tower (of `scenes.seed`) has trained on none of them.
    """
    train = Cells(replace(scenes, seed=scenes.seed + 1), pictures, processor)
    test = Cells(replace(scenes, seed=scenes.seed + 2), pictures // 3, processor, pool="composition")
    train.hue_shifted = 0.0
    (known, known_labels), (asked, asked_labels) = _cells(vision, train), _cells(vision, test)
    mean, deviation = known.mean(0), known.std(0) + 1e-5
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    found = {}
    for key, nothing in (("names", len(train.names)), ("colors", len(train.colors))):
        if nothing == 0:
            continue
        head = nn.Linear(known.shape[1], nothing + 1)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(head=head, key=key, optimizer=optimizer):
            optimizer.zero_grad()
            loss = functional.cross_entropy(head(known), known_labels[key])
            loss = loss + 1e-4 * head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        things = asked_labels[key] < nothing
        right = head(asked)[things, :nothing].argmax(-1) == asked_labels[key][things]
        found[key.removesuffix("s")] = right.float().mean().item()
    return found
