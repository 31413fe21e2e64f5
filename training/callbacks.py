"""Logging of a run: speed, waiting, memory, where it looks; and a stop at a loss that is not finite or spikes.

- `WatchedTrainer` logs, with every entry, `tokens_per_second`, `images_per_second`, `data_wait` (share of the time
  spent waiting for batches), `mfu` (model FLOPs over the devices' peak) and `memory_gib` (peak of one device; on a CPU
  of one process). They go wherever Trainer reports to (`report_to`: TensorBoard, trackio, ...).
- It stops before the optimizer's step if that step's loss or gradient is not finite, or the loss is `loss_spike` times
  the usual one, and writes down which rows were in it. All processes agree on it: one that stopped alone would leave
  the others waiting.
- A row that cannot be used is left out (`collator.py`), listed once in `skipped_rows.jsonl` in the run's folder, and
  counted in the log. A row whose mask cannot guide is listed in `unguided_rows.jsonl` and trains without guidance. The
  run stops if more than half of the rows are unusable.

FLOPs are those of the matrix products that the weights stand for, and of attention: 2 per weight and position forward,
as many again backward where a gradient passes through (everywhere but in frozen stages of the tower), and again where
the weight trains (Kaplan et al. 2020, section 2.1). Activations that are computed twice count once.
"""

import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback
from transformers.trainer_utils import unwrap_peft_model

from agevlm.data.rows import open_row
from agevlm.drawing import outline, overlay, panels, peak_of
from agevlm.images import save_image
from agevlm.language import HeldText, perplexity
from agevlm.store import read_lines, write_json, write_lines
from agevlm.training.collator import PARTLY_GUIDED_ROWS, ROW_IDS, SKIPPED_ROWS, UNGUIDED_ROWS, guided_phrases
from agevlm.training.curve import answer_turns
from agevlm.training.features import are_features
from agevlm.training.freezing import part_of
from agevlm.training.lineage import write_lineage
from agevlm.training.on_cpu import AnswerHeadTrainer


USUAL_STEPS, FEWEST_STEPS = 100, 20  # the usual loss: the median of so many steps, known after so many
FEWEST_ROWS = 32  # most rows are bad: known after so many


class DivergedError(RuntimeError):
    """A step would have ruined the weights; the message names the file that says which rows were in it."""


class ListedRows:
    """Rows with one kind of fault, listed in `KIND.jsonl` in the run's folder.

    Args:
        kind: `skipped_rows`, `unguided_rows` or `partly_guided_rows`: the name in batches, of the file and in the log.
        what: of a faulty row, in messages.
    """

    def __init__(self, kind: str, what: str):
        self.kind, self.what = kind, what
        self.clear()

    def clear(self) -> None:
        self.rows: dict[str, list[str]] = {}  # id and reason by place, of all processes; up to date after each entry
        self.new: list[list[str]] = []  # since then, of this process
        self.counts = torch.zeros(2, dtype=torch.int64)  # rows of this process that could have the fault, that have it
        self.whole = True  # whether they count from the first step

    def path(self, folder: str | Path | None) -> Path:
        """The list of a run."""
        return Path(str(folder)) / f"{self.kind}.jsonl"

    def add(self, faulty: list[list[str]], rows: int) -> None:
        """The [place, id, reason] of a batch's faulty rows, among `rows` that could be."""
        self.new += faulty
        self.counts += torch.tensor([rows, len(faulty)])

    def start(self, args: Any, going_on: bool) -> None:
        """Start from the list of an interrupted run, or from an empty one."""
        self.clear()
        self.whole = not going_on
        path = self.path(args.output_dir)
        if going_on and path.is_file():
            self.rows = {line["place"]: [line["id"], line["reason"]] for line in read_lines(path)}
        elif args.should_save:
            path.unlink(missing_ok=True)

    def record(self, trainer: AnswerHeadTrainer, at_end: bool) -> None:
        """Exchanges new rows and lists them; all processes call it.

        Raises:
            ValueError: most rows are faulty, in all processes; at the end of a run that was not interrupted, all are.
        """
        known, path = len(self.rows), self.path(trainer.args.output_dir)
        for place, *facts in gather_object(self.new):
            self.rows.setdefault(place, facts)
        self.new = []
        if len(self.rows) > known and trainer.args.should_save:
            listed = self.rows.items()
            write_lines(path, [{"place": place, "id": name, "reason": why} for place, (name, why) in listed])
        rows, faulty = trainer.accelerator.reduce(self.counts.to(trainer.args.device), reduction="sum").tolist()
        if (rows >= FEWEST_ROWS and 2 * faulty > rows) or (at_end and self.whole and 0 < rows == faulty):
            raise ValueError(
                f"{faulty} of {rows} rows {self.what}, which is no accident. {path} says why, for example: "
                f"{next(iter(self.rows.values()))[1]}"
            )


class Watch(TrainerCallback):
    """Lets a [`WatchedTrainer`] check a step's loss and gradient before the optimizer uses them. A resumed run logs
    the same as an uninterrupted one: each checkpoint comes with a log entry, from which tokens are counted on."""

    def __init__(self, trainer: "WatchedTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = int(counted[-1]) if counted else 0

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_step()


class WatchedTrainer(AnswerHeadTrainer):
    """TRL's `SFTTrainer` that measures itself and stops in time. Batches may carry their `row_ids`."""

    def __init__(self, model: PreTrainedModel, args: Any, **kwargs):
        self._peak_flops: float | None = None
        self._started = time.perf_counter()
        self._waited = 0.0
        self._counted = torch.zeros(3, dtype=torch.float64)  # tokens, images, FLOPs
        self._flops_of_batches: deque[float] = deque()  # of the step, of this process
        self.turns = 0  # assistant turns of the step, of this process
        self._step: list[tuple[torch.Tensor, list[str]]] = []  # loss and rows of the step's batches
        self._row_ids: deque[list[str]] = deque()
        self._gradient_norm: Any = None
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self.skipped = ListedRows(SKIPPED_ROWS, "could not be used")
        self.unguided = ListedRows(UNGUIDED_ROWS, "with a mask could not be guided")
        self.partly = ListedRows(PARTLY_GUIDED_ROWS, "have phrases that could not be guided")
        self.listed = (self.skipped, self.unguided, self.partly)
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(Watch(self))

    # ---- Speed ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's, timed; the batches' row ids stay here."""
        start = time.perf_counter()
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - start
        self._step.clear()
        self._row_ids = deque(batch.pop(ROW_IDS, []) for batch in batch_samples)
        for batch in batch_samples:
            self.skipped.add(batch.pop(SKIPPED_ROWS, []), len(batch["input_ids"]))
            self._count_unguided(batch)
        self.turns = sum(answer_turns(batch["labels"]) for batch in batch_samples)
        counted = [self._flops.of(batch) for batch in batch_samples]
        self._flops_of_batches = deque(flops for *_, flops in counted)
        self._counted += torch.tensor(counted, dtype=torch.float64).sum(0)
        return batch_samples, num_items_in_batch

    def floating_point_ops(self, inputs) -> float:
        """Of a batch, as `mfu` counts them, for `total_flos`. Trainer's estimate counts the tower for each token of
        the text, and walks all modules for it in every step."""
        return self._flops_of_batches.popleft()

    @cached_property
    def _flops(self) -> "Flops":
        return Flops(unwrap_peft_model(self.accelerator.unwrap_model(self.model)))

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        for name in (ROW_IDS, UNGUIDED_ROWS, PARTLY_GUIDED_ROWS):  # of evaluations
            inputs.pop(name, None)
        self.skipped.add(inputs.pop(SKIPPED_ROWS, []), 0)
        return inputs

    def _count_unguided(self, batch: dict[str, Any]) -> None:
        """Raises ValueError at a row that cannot be guided (whole), where `strict`."""
        unguided, partly = batch.pop(UNGUIDED_ROWS, []), batch.pop(PARTLY_GUIDED_ROWS, [])
        if self.args.guidance_weight == 0:
            return
        if (unguided or partly) and self.args.strict:
            raise ValueError((unguided or partly)[0][-1])
        self.unguided.add(unguided, int(guided_phrases(batch).any(1).sum()) + len(unguided))
        self.partly.add(partly, 0)  # they are guided, however many

    def _speed(self) -> dict[str, float]:
        """Metrics since the last call, over all processes."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        sums = torch.cat([self._counted, torch.tensor([self._waited], dtype=torch.float64)])
        self._counted, self._waited = torch.zeros_like(self._counted), 0.0
        sums = self.accelerator.reduce(sums.float().to(self.args.device), reduction="sum").tolist()
        tokens, images, flops, waited = (value / self.get_tp_size() for value in sums)
        processes = self.accelerator.num_processes
        if self._peak_flops is None:
            tflops = self.args.peak_tflops
            self._peak_flops = tflops * 1e12 if tflops else measured_peak(self.args.device, self.args.bf16)
            self._started = time.perf_counter()
        return {
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "data_wait": min(1.0, waited / processes * self.get_tp_size() / seconds),
            "mfu": flops / seconds / (self._peak_flops * processes),
            "memory_gib": peak_memory(self.args.device) / 2**30,
        }

    def train(self, resume_from_checkpoint=None, **kwargs):
        for rows in self.listed:
            rows.start(self.args, going_on=bool(resume_from_checkpoint))
        self._started = time.perf_counter()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the speed since the last entry of training, and how many rows could not be used or guided."""
        if self.model.training and "loss" in logs:
            logs.update(self._speed())
        self.record_rows(at_end="train_loss" in logs)
        logs.update({faulty.kind: len(faulty.rows) for faulty in self.listed if faulty.rows})
        super().log(logs, start_time)

    def record_rows(self, at_end: bool = False) -> None:
        """Lists the rows that cannot be used or guided; raises as `ListedRows.record`."""
        for rows in self.listed:
            rows.record(self, at_end)

    # ---- Stopping ----

    def training_step(self, *args, **kwargs):
        """TRL's; its loss is kept for `check_step`."""
        loss = super().training_step(*args, **kwargs)
        self._step.append((loss.detach(), self._row_ids.popleft() if self._row_ids else []))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        self._gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self._gradient_norm

    def check_step(self) -> None:
        """Stops if the step that has been computed must not be taken.

        Raises:
            DivergedError: in all processes, after the file has been written.
        """
        losses = torch.stack([loss.float() for loss, _ in self._step]) if self._step else torch.zeros(1)
        loss = self.accelerator.reduce(losses.sum().to(self.args.device), reduction="mean").item()
        # Half precision scales its losses up until they overflow now and then; the scaler skips such steps by itself.
        norm = 0.0 if self._gradient_norm is None or self.args.fp16 else self._gradient_norm
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        usual = statistics.median(self._usual) if len(self._usual) >= FEWEST_STEPS else None
        spike = self.args.loss_spike
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient's norm is {norm}"
        elif spike is not None and usual is not None and loss > spike * usual:
            reason = f"the loss is {loss:.4g}, more than {spike:g} times the usual {usual:.4g}"
        else:
            self._usual.append(loss)
            return
        step = self.state.global_step + 1
        batches = [
            {"loss": in_json(float(value)), ROW_IDS: rows} for value, (_, rows) in zip(losses, self._step, strict=True)
        ]
        everywhere = gather_object([{"process": self.accelerator.process_index, "batches": batches}])
        path = Path(self.args.output_dir) / f"stopped-before-step-{step}.json"
        if self.args.should_save:
            facts = {"step": step, "reason": reason, "loss": in_json(loss), "usual_loss": usual}
            facts["gradient_norm"] = in_json(norm)
            write_json(path, {**facts, "processes": everywhere})
        self.accelerator.wait_for_everyone()
        raise DivergedError(
            f"Stopped before step {step}: {reason}. {path} holds the ids of its rows. Look at them, lower the "
            "learning rate or raise `loss_spike`; the checkpoints from before are untouched."
        )


def in_json(value: float) -> float | str:
    """A number that JSON does not know as its name."""
    return value if math.isfinite(value) else str(value)


class Flops:
    """Floating-point operations that a batch costs a model, with what trains of it now."""

    def __init__(self, model: PreTrainedModel):
        config = model.config
        text = config.get_text_config()
        self.per_token = self.per_cell = self.per_answer = 0.0  # TRL's fused head computes answer tokens only
        self.tower: list[tuple[float, int]] = []  # (FLOPs per position, stride)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                size = module.out_channels * module.in_channels // module.groups * math.prod(module.kernel_size)
            elif isinstance(module, nn.Linear):
                size = module.in_features * module.out_features
            else:
                continue
            name, trains = name.removesuffix(".base_layer"), module.weight.requires_grad
            if "vision_tower." in name:
                _, _, stage = name.partition("vision_tower.encoder.stages.")
                stride = 4 * 2 ** int(stage.split(".")[0] or 0)  # the embeddings' is that of stage 0
                self.tower.append((2 * size * (3 if trains else 1), stride))
                continue
            cost = 2 * size * (3 if trains else 2)
            if name.endswith("lm_head"):
                self.per_answer += cost
            elif part_of(name) == "projector" or name.endswith(("cross_attn.k_proj", "cross_attn.v_proj")):
                self.per_cell += cost
            else:
                self.per_token += cost
        # Attention: query-key and attention-value products, forward once and backward twice.
        width = text.num_attention_heads * text.head_dim
        self.self_attention = 3 * 4 * width * text.num_hidden_layers / 2  # per pair of tokens, causal
        self.cross_attention = 3 * 4 * width * len(getattr(config, "cross_attention_layers", ()))  # per token and cell

    def of(self, batch: Mapping[str, torch.Tensor]) -> tuple[float, float, float]:
        """(tokens, images, FLOPs) of a batch; padding counts for nothing, as it does for the user."""
        lengths = batch["attention_mask"].sum(1).double()
        tokens, answers = float(lengths.sum()), float((batch["labels"] != -100).sum())
        flops = self.per_token * tokens + self.per_answer * answers + self.self_attention * float((lengths**2).sum())
        if "pixel_values" not in batch:
            return tokens, 0.0, flops
        # The twin's batches hold real pictures alone, and its texts hold their cells.
        masked = "image_mask" in batch
        images = float(batch["image_mask"].sum()) if masked else float(len(batch["pixel_values"]))
        seen = float((lengths * batch["image_mask"].sum(1)).sum()) if masked else 0.0  # pairs of tokens and pictures
        height, width = batch["pixel_values"].shape[-2:]
        if are_features(batch["pixel_values"]):
            cells = float(height)  # (cells, width of features); the tower does not run
        else:
            cells = height * width / 32**2
            flops += images * sum(cost * height * width / stride**2 for cost, stride in self.tower)
        flops += images * cells * self.per_cell + self.cross_attention * cells * seen
        return tokens, images, flops


def measured_peak(device: torch.device, bf16: bool) -> float:
    """FLOPs per second of the largest matrix products one device makes in the type that trains."""
    size, dtype = (8192 if device.type != "cpu" else 512), torch.bfloat16 if bf16 else torch.float32
    own = torch.Generator(device)  # the global one is the run's, and each process of a run measures once
    left, right = (torch.randn(size, size, generator=own, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + 0.2
    while time.perf_counter() < end or not best:
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_memory(device: torch.device) -> float:
    """Bytes: of an accelerator's allocator, or of this process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Probes(TrainerCallback):
    """Draws where the model looks on a few fixed rows, into `probes/step-NNNNNNNN.png` of the run's folder.

    One line per phrase: its words, the picture with its mask's outline, and their attention on it, mean over the cross
    layers, on one color scale. TensorBoard and trackio get the same picture, if the run reports to them.

    Args:
        trainer: its collator makes the batch.
        rows: guided rows.
        every: optimizer steps between two drawings.
    """

    def __init__(self, trainer: WatchedTrainer, rows: Sequence[Mapping[str, Any]], every: int):
        self.trainer, self.every = trainer, every
        self.rows, self.opened = rows, [open_row(row) for row in rows]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.draw(model, Path(args.output_dir) / "probes" / f"step-{state.global_step:08d}.png")

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Draw the rows and report the picture. All processes compute (parameters may be sharded), one writes."""
        was_training = model.training
        model.eval()
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(self.rows))
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "guidance_mask")}
        with self.trainer.compute_loss_context_manager():
            maps_KBPL = model(**inputs, logits_to_keep=1).cross_attention_maps
        model.train(was_training)
        if not self.trainer.args.should_save:
            return
        processor = self.trainer.data_collator.processor.image_processor
        cells_BPL = maps_KBPL.float().mean(0).cpu().numpy()[..., : math.prod(processor.grid)]  # of the first picture
        shown = [
            (row["images"][0], phrase["query"], phrase["mask"], cells_BPL[place, number])
            for place, row in enumerate(self.opened)
            for number, phrase in enumerate(row["guidance"])
        ]
        heats = [
            processor.grid_to_pixels(cells.reshape(processor.grid), (image.height, image.width))
            for image, *_, cells in shown
        ]
        heats = [heat / max(heat.mean(), 1e-12) for heat in heats]  # in times an even spread
        peak = peak_of(heats)
        lines = [
            [(words, outline(image, mask)), ("", overlay(image, heat, peak, mask))]
            for (image, words, mask, _), heat in zip(shown, heats, strict=True)
        ]
        sheet = panels(lines, side=256, peaks=[peak])
        save_image(sheet, path)
        step = self.trainer.state.global_step
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image("probes", np.asarray(sheet), step, dataformats="HWC")
            elif isinstance(callback, TrackioCallback):
                import trackio

                trackio.log({"probes": trackio.Image(str(path)), "train/global_step": step})


class MeasureLanguage(TrainerCallback):
    """Measures how well the model predicts a held text, as `before` and `after` of its trainer's lineage.

    All processes compute (parameters may be sharded). A resumed run keeps the number measured before.

    Args:
        trainer: a `StageTrainer`, whose lineage has a field `language`.
    """

    def __init__(self, trainer: Any, held: HeldText):
        self.trainer, self.held = trainer, held

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.measure(model, "before")
            if args.should_save:
                write_lineage(args.output_dir, self.trainer.lineage)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.measure(model, "after")

    def measure(self, model: nn.Module, when: str) -> None:
        tokenizer = self.trainer.processing_class.tokenizer
        with self.trainer.compute_loss_context_manager():
            self.trainer.lineage["language"][when] = perplexity(model, tokenizer, self.held)
