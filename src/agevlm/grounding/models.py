"""The parts of a backend on transformers' own classes: text to boxes (Florence-2, Grounding DINO), boxes to mask (SAM,
SAM 2), and SAM 3, which does both (section 3.2.2, appendix A).

The paper's recipe is Grounded-SAM-2's: Florence-2's answer to <REFERRING_EXPRESSION_SEGMENTATION> is a polygon, its
bounding box prompts SAM. That pipeline reads the first instance only and fails where it has several pieces; here every
instance gives one box around all its pieces, and the mask is the union over the instances.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Sam2Model,
    Sam2Processor,
    Sam3Model,
    Sam3Processor,
    SamModel,
    SamProcessor,
)
from transformers.utils import is_torchvision_available

from agevlm.models import PROCESSOR, load_weights, reading

from .masks import Box, clip_box, mask_box, polygon_box, usable_pieces
from .regions import NO_REGION, TEXT_TOO_LONG, Grounding


MAX_BOXES = 32  # of one picture: what a segmenter computes grows with the largest number in the batch
SEGMENTATION_TASK = "<REFERRING_EXPRESSION_SEGMENTATION>"
PHRASES_TASK = "<CAPTION_TO_PHRASE_GROUNDING>"


class Part:
    """A published model and its processor, from the Hub or from a folder.

    Args:
        name: repository or folder; `revision` is the repository's branch, tag or commit.
        dtype: of the weights; None: bfloat16 on an accelerator, float32 on a processor.

    Raises:
        ValueError: it cannot be had, or torchvision is missing, which SAM 2's and SAM 3's processors are written for.
    """

    model_class: Any
    processor_class: Any
    needs_torchvision = False

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        if self.needs_torchvision and not is_torchvision_available():
            raise ValueError(
                f"{self.model_class.__name__} needs torchvision: pip install 'agevlm[ground]' (beside the package "
                "index's own torch, not a CPU build), or take a backend with SAM 1 (florence2+sam)"
            )
        device = torch.device(device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        revision = revision or "main"
        model = load_weights(self.model_class, name, revision=revision, dtype=dtype, use_safetensors=True)
        with reading(name, PROCESSOR):
            self.processor = self.processor_class.from_pretrained(name, revision=revision)
        self.model = model.to(device).eval()
        self.name, self.commit = name, getattr(model.config, "_commit_hash", None)

    def tensors(self, inputs: Any) -> dict[str, torch.Tensor]:
        """A processor's output on the model's device, floating point in its precision."""
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }


class Grounder(Part, ABC):
    """Texts to groundings. Texts over the limit are refused, the others go to `find` as prompts."""

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Grounding]:
        prompts, limit = [self.prompt(text) for text in texts], self.limit
        lengths = [self.length(prompt) for prompt in prompts]
        results = [
            Grounding(outcome=TEXT_TOO_LONG, detail=f"{length} tokens, {limit} is the limit") for length in lengths
        ]
        fitting = [index for index, length in enumerate(lengths) if length <= limit]
        if fitting:
            found = self.find([images[index] for index in fitting], [prompts[index] for index in fitting])
            for index, grounding in zip(fitting, found, strict=True):
                results[index] = grounding
        return results

    @property
    def limit(self) -> int:
        """Tokens that the model reads."""
        return self.model.config.text_config.max_position_embeddings

    def prompt(self, text: str) -> str:
        return text

    def length(self, prompt: str) -> int:
        """Tokens of a prompt."""
        return len(self.processor.tokenizer(prompt)["input_ids"])

    @abstractmethod
    def find(self, images: list[Image.Image], prompts: list[str]) -> list[Grounding]:
        """The regions of each picture that its prompt, which is within `limit`, names."""


class Florence2(Grounder):
    """Text to boxes by Florence-2: the referred expression's polygon (appendix A), or with `phrases` a box for every
    phrase of the text."""

    model_class, processor_class = Florence2ForConditionalGeneration, Florence2Processor

    def __init__(self, *args: Any, phrases: bool = False, max_new_tokens: int = 1024, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.task = PHRASES_TASK if phrases else SEGMENTATION_TASK
        self.max_new_tokens = max_new_tokens

    def prompt(self, text: str) -> str:
        # A query that names a task would be taken for one; none does in earnest.
        return self.task + text.replace("<", " ").replace(">", " ")

    def length(self, prompt: str) -> int:
        """Tokens of a prompt with its picture's, begin and end."""
        (text,) = self.processor._construct_prompts(prompt)
        tokens = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(tokens) + self.processor.num_image_tokens + 2

    def find(self, images: list[Image.Image], prompts: list[str]) -> list[Grounding]:
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        generated = self.model.generate(
            **self.tensors(inputs), max_new_tokens=self.max_new_tokens, num_beams=3, do_sample=False
        )
        answers = self.processor.batch_decode(generated, skip_special_tokens=False)
        return [self.parse(answer, image.size) for answer, image in zip(answers, images, strict=True)]

    def parse(self, answer: str, size: tuple[int, int]) -> Grounding:
        """An answer about a picture of (width, height)."""
        found = self.processor.post_process_generation(answer, task=self.task, image_size=size)[self.task]
        if self.task == PHRASES_TASK:
            boxes = [clip_box(box, size) for box in found["bboxes"]]
            return _grounding(boxes, [], f"{len(found['bboxes'])} boxes in the answer", found["labels"])
        instances = found["polygons"]
        polygons = [piece for instance in instances for piece in usable_pieces(instance)]
        boxes = [polygon_box(instance, size) for instance in instances]
        return _grounding(boxes, polygons, f"{len(instances)} polygons in the answer")


class GroundingDino(Grounder):
    """Text to boxes by Grounding DINO. It was trained on noun phrases; of a sentence it finds what words name."""

    model_class, processor_class = GroundingDinoForObjectDetection, GroundingDinoProcessor
    threshold = text_threshold = 0.25

    @property
    def limit(self) -> int:
        return min(super().limit, getattr(self.model.config, "max_text_len", super().limit))

    def prompt(self, text: str) -> str:
        # One lower-cased label that ends in a dot; a dot inside would be two labels.
        return f"{text.lower().replace('.', ' ').strip()}."

    def find(self, images: list[Image.Image], prompts: list[str]) -> list[Grounding]:
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            outputs = self.model(**self.tensors(inputs))
        outputs.logits, outputs.pred_boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
        found = self.processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=self.threshold,
            text_threshold=self.text_threshold,
            target_sizes=[(image.height, image.width) for image in images],
        )
        groundings = []
        for image, result in zip(images, found, strict=True):
            best = result["scores"].argsort(descending=True)
            boxes = [clip_box(box, image.size) for box in result["boxes"][best].tolist()]
            end = self.processor.tokenizer.sep_token
            labels = [result["text_labels"][place].replace(end, "") for place in best.tolist()]
            groundings.append(_grounding(boxes, [], f"{len(boxes)} boxes over {self.threshold}", labels))
        return groundings


class Sam(Part):
    """Boxes to masks by SAM: every picture is encoded once."""

    model_class, processor_class = SamModel, SamProcessor

    def __call__(self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[tuple[Any, Any]]:
        """For each picture the masks of its boxes, bool array `(boxes, height, width)`, and their predicted IoU.

        Args:
            boxes: at least one for each picture.
        """
        # SAM wants equally many boxes of every picture. Each is a prompt of its own, so repeats change nothing.
        most = max(len(row) for row in boxes)
        padded = [[*row, *[row[-1]] * (most - len(row))] for row in boxes]
        inputs = self.processor(images=list(images), input_boxes=padded, return_tensors="pt")
        tensors = self.tensors({name: inputs[name] for name in ("pixel_values", "input_boxes")})
        with torch.no_grad():
            outputs = self.model(**tensors, multimask_output=False)
        sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]  # SAM 1 pads
        masks = self.processor.post_process_masks(outputs.pred_masks.float().cpu(), *sizes)  # (N, 1, H, W) bool each
        scores = outputs.iou_scores.float().cpu()  # (B, N, 1)
        return [
            (mask[: len(row), 0].numpy(), score[: len(row), 0])
            for mask, score, row in zip(masks, scores, boxes, strict=True)
        ]


class Sam2(Sam):
    """Boxes to masks by SAM 2. Its own processor class by name: published folders ask for the one of videos."""

    model_class, processor_class = Sam2Model, Sam2Processor
    needs_torchvision = True


class Sam3(Grounder):
    """Text to mask by SAM 3: its semantic segmentation is the union over all instances of a concept. Short noun
    phrases only: it reads 32 tokens."""

    model_class, processor_class = Sam3Model, Sam3Processor
    needs_torchvision = True
    limit = 32  # type: ignore[assignment]

    def find(self, images: list[Image.Image], prompts: list[str]) -> list[Grounding]:
        inputs = self.processor(images=images, text=prompts, return_tensors="pt")
        tensors = self.tensors(inputs)
        tensors.pop("original_sizes", None)
        with torch.no_grad():
            outputs = self.model(**tensors)
        outputs.semantic_seg = outputs.semantic_seg.float().cpu()
        masks = self.processor.image_processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(image.height, image.width) for image in images]
        )
        groundings = []
        for mask, score in zip(masks, outputs.presence_logits.float().sigmoid().flatten().tolist(), strict=True):
            array = mask.bool().numpy()
            grounding = _grounding([mask_box(array)], [], "no pixel over 0.5")
            grounding.masks, grounding.scores = array[None] if grounding.boxes else None, np.array([score])
            groundings.append(grounding)
        return groundings


def _grounding(boxes: Sequence[Box | None], polygons: list[Any], detail: str, labels: Sequence[str] = ()) -> Grounding:
    labels = [label for label, box in zip(labels, boxes, strict=False) if box is not None]
    inside = [box for box in boxes if box is not None]
    if not inside:
        return Grounding([], polygons, NO_REGION, detail)
    beyond = f"the first {MAX_BOXES} of {len(inside)} boxes are used" if len(inside) > MAX_BOXES else ""
    return Grounding(inside[:MAX_BOXES], polygons, detail=beyond, labels=labels[:MAX_BOXES])
