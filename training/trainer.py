"""SFT with attention guidance (paper section 3.2.2): the standard LM loss plus L_g, "trained with equal weights".

`AgeVlmSFTTrainer` is TRL's `SFTTrainer` plus:
- The guidance loss, taken from the attention maps that the backbone returns in the same forward pass. TRL's fused LM
  head keeps only the backbone's hidden states, so a forward hook keeps the maps. Full logits are never built.
  Where most tokens are guided the backbone is asked for the attention inside the mask alone, which is cheaper
  (`modeling_agevlm/guidance_agevlm.py`); in steps that are logged always for the maps, so that pointing is known.
- Its scale: TRL divides the language-modeling loss by the answer tokens of the whole optimizer step (all accumulated
  micro-batches, all processes); guidance is divided by the guided rows of the whole step in the same way. One batch of
  8, 8 accumulated batches of 1 and 2 processes give the same gradients, however the masks are spread.
- Metrics averaged over rows, and a model card in every saved folder.

A phrase is guided if its mask has a cell and its query a token that sees a picture. Eq. 3 is averaged over the guided
phrases of a row, then over the rows that have some; a row with one mask has one phrase. With `guidance_weight=0` a
training step is stock SFT; evaluation still measures where the model looks.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from agevlm.hub_cards.render import write_card
from agevlm.processing import AgeVlmProcessor
from agevlm.training.callbacks import Probes
from agevlm.training.collator import AgeVlmDataCollator, PlacedRows, guided_phrases
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.features import fix_layout
from agevlm.training.freezing import part_of
from agevlm.training.losses import guidance_loss, guidance_loss_of_mass, in_mask_mass, pointing_accuracy
from agevlm.training.publish import push, repository_name
from agevlm.training.sampling import check_guided, guided_flags
from agevlm.training.stage_trainer import StageTrainer


# Share of guided tokens in a batch from which one wider attention call is cheaper than computing their maps
# (docs/benchmarks/guidance.md).
MASS_FROM_SHARE = 0.25
PROBES = 4  # rows that `probe_steps` draws


class AgeVlmSFTTrainer(StageTrainer):
    """TRL's `SFTTrainer` for AGE-VLM, with the guidance loss.

    Batches are those of `AgeVlmDataCollator`: the model's inputs, `labels`, and where rows are guided
    `guidance_query_mask` (batch, phrases, text) and `guidance_mask` (batch, phrases, images, cells).

    Args:
        args (`AgeVlmSFTConfig`): see there.
        processing_class (`AgeVlmProcessor`): of the model.
        data_collator (`AgeVlmDataCollator`, *optional*): default: one with `max_length` and `pad_to_multiple_of` of
            `args`. One that sets no `max_length` gets that of `args`.
        lineage (`dict`, *optional*): JSON-ready facts about the run (`run_stage.py`). Every saved folder
            gets them as `agevlm_stage.json`, and a model card made of them.
        **kwargs: those of `SFTTrainer`.

    Raises:
        ValueError: no processor to make a collator with; under guidance also rows without a mask, or a collator of
            another kind, which would leave the guidance of every row out.
    """

    _tag_names = ["trl", "sft", "agevlm"]  # noqa: RUF012 - the attribute TRL reads

    def __init__(self, model: PreTrainedModel, args: AgeVlmSFTConfig, lineage: dict | None = None, **kwargs):
        if args.guidance_weight > 0 and (kwargs.get("compute_loss_func") or args.label_smoothing_factor > 0):
            raise ValueError(
                "`compute_loss_func` and `label_smoothing_factor` need a second forward pass, which guidance does not "
                "follow. Leave them out, or set `guidance_weight=0`."
            )
        check_guided(kwargs.get("train_dataset"), args.guidance_weight)
        kwargs["data_collator"] = self._collator(args, **kwargs)
        self._attention: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # maps, mass
        self._guided_rows: torch.Tensor | None = None
        self._guidance_sums: dict[str, Any] = defaultdict(float)
        super().__init__(model=model, args=args, lineage=lineage, **kwargs)
        if getattr(model, "hf_quantizer", None) is not None:
            # TRL keeps what trains beside quantized weights in bfloat16, where a step of 1e-5 is rounded away.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        # Sharded by accelerate, or on loading (`DistributedConfig`), of which `is_fsdp_enabled` knows nothing
        loaded_in_shards = (unwrap_peft_model(self.model).fsdp_size or 1) > 1
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or loaded_in_shards
        tower = unwrap_peft_model(self.model).base_model.vision_tower
        self.frozen_tower = None if is_sharded or any(p.requires_grad for p in tower.parameters()) else tower
        if self.frozen_tower is not None:
            fix_layout(self.frozen_tower, args.per_device_train_batch_size)
        if isinstance(self.data_collator, AgeVlmDataCollator):
            self.data_collator.always_pictures |= is_sharded
            self.data_collator.pixels_as_bytes = self.data_collator.row_ids = True
            self.data_collator.strict = args.strict
        if args.probe_steps:
            self.add_callback(Probes(self, self._probe_rows(), args.probe_steps))
        self._backbone_hook = unwrap_peft_model(self.model).base_model.register_forward_hook(self._on_backbone_output)

    @staticmethod
    def _collator(args: AgeVlmSFTConfig, data_collator: Any = None, processing_class: Any = None, **_: Any) -> Any:
        """The collator to train with, see the class. TRL's own would drop guidance in silence."""
        if data_collator is None:
            if not isinstance(processing_class, AgeVlmProcessor):
                raise ValueError(
                    f"`processing_class` must be the model's AgeVlmProcessor, got {type(processing_class).__name__}: "
                    "AgeVlmProcessor.from_pretrained(CHECKPOINT)."
                )
            data_collator = AgeVlmDataCollator(processing_class, pad_to_multiple_of=args.pad_to_multiple_of)
        if not isinstance(data_collator, AgeVlmDataCollator):
            if args.guidance_weight > 0:
                raise ValueError(
                    f"`data_collator` is a {type(data_collator).__name__}, which leaves guidance out. Leave it out to "
                    "have an AgeVlmDataCollator made, give one, or set `guidance_weight=0`."
                )
        elif data_collator.max_length is None:
            data_collator.max_length = args.max_length
        return data_collator

    def release_model(self) -> None:
        """Take the hook, the tower's layout and TRL's fused head off the model, so that it is like a new one."""
        self._backbone_hook.remove()
        if self.frozen_tower is not None:
            del self.frozen_tower.forward
        super().release_model()

    # ---- Loss ----

    def _on_backbone_output(self, backbone: nn.Module, args: tuple, output: Any) -> Any:
        """Keep the attention maps, or the mass, of the forward pass that is running."""
        self._attention = output.cross_attention_maps, output.cross_attention_mass
        if torch.is_grad_enabled() and output.image_outputs is None:
            # A batch without pictures passes by the tower, the projector and the cross blocks. Their gradients are
            # zero, not missing: an optimizer takes no step without a gradient, so that a step of text alone would
            # depend on how its batches are divided. And in stages 1 to 3 nothing else trains. Added inside the forward
            # pass, where DistributedDataParallel looks for the weights in use.
            passed_by = [
                p for n, p in backbone.named_parameters() if p.requires_grad and part_of(n) != "language_model"
            ]
            if passed_by:
                zero: Any = sum(0.0 * parameter.flatten()[0] for parameter in passed_by)
                output.last_hidden_state = output.last_hidden_state + zero.to(output.last_hidden_state.dtype)
        return output

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Trainer's, and the number of guided rows of the whole optimizer step, counted like TRL's answer tokens."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.zeros((), device=device)
        if self.args.guidance_weight > 0:
            for batch in batch_samples:
                count += guided_phrases(batch).any(1).sum().to(device)
            # Tensor-parallel ranks read the same rows.
            count = self.accelerator.gather(count).sum() / self.get_tp_size()
        self._guided_rows = count
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss plus `guidance_weight` times the mean guidance loss of the guided rows."""
        training = self.model.training
        guided_BP = guided_phrases(inputs)
        guided = guided_BP.any(1)
        mask = inputs.pop("guidance_mask", None)
        if training and self.args.guidance_weight == 0:
            inputs.pop("guidance_query_mask", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        if mask is None and training and self.is_deepspeed_enabled:
            # ZeRO-3 fetches weights in an order that all processes must share, and a map that is asked for is one more
            # output whose gradient passes through a block. So every batch asks; without rows to guide, for zeros.
            cells = math.prod(self.processing_class.image_processor.grid)
            rows, images = inputs["image_mask"].shape
            mask = guided.new_zeros(rows, 1, images, cells)
            inputs["guidance_query_mask"] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)[:, None]
        if mask is not None and self._needs_mass_only(inputs["guidance_query_mask"]):
            inputs["guidance_mask"] = mask
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        (maps, mass), self._attention = self._attention, (None, None)
        # Sums over rows: loss and mass of the guided ones (means of their phrases), their number; pointing, how often
        # it is known; all rows.
        stats_B6 = torch.zeros(inputs["input_ids"].shape[0], 6, device=self.args.device)
        stats_B6[:, 5] = 1
        if mask is not None:
            mask = mask.flatten(0, 1).flatten(1)
            if maps is None:
                mass = mass.flatten(1)
                loss = guidance_loss_of_mass(mass, mask)
                stats = (loss, mass.mean(0), torch.ones_like(loss), torch.zeros_like(loss), torch.zeros_like(loss))
            else:
                maps = maps.flatten(1, 2)
                loss = guidance_loss(maps, mask, self.args.guidance_normalization, self.args.guidance_loss)
                known = torch.ones_like(loss)
                stats = (loss, in_mask_mass(maps, mask), known, pointing_accuracy(maps, mask), known)
            stats_BP5 = torch.stack(stats, dim=-1).view(*guided_BP.shape, 5).masked_fill(~guided_BP[..., None], 0)
            stats_B5 = stats_BP5.sum(1) / guided_BP.sum(1, keepdim=True).clamp(min=1)
            stats_B6[:, :5], loss = stats_B5.detach(), stats_B5[:, 0]
            if training:
                # DDP averages the gradients of the processes, and `_guided_rows` counts the rows of all of them.
                count = self._guided_rows / (self.accelerator.num_processes // self.get_tp_size())
            else:
                count = guided.sum()
            guidance = self.args.guidance_weight * loss.sum() / torch.where(count > 0, count, 1)
            result = (result[0] + guidance, result[1]) if return_outputs else result + guidance
        if training:
            self._guidance_sums["train"] += stats_B6.sum(dim=0)
        else:
            # The last batch of an evaluation may repeat rows to fill all processes; this gather leaves them out.
            self._guidance_sums["eval"] += self.accelerator.gather_for_metrics(stats_B6).sum(dim=0)
        return result

    def _needs_mass_only(self, query_mask_BPT: torch.Tensor) -> bool:
        """Whether a training batch is served by the attention inside its masks; else by whole maps."""
        if not self.model.training or (self.args.guidance_loss, self.args.guidance_normalization) != ("dice", "sum"):
            return False
        is_logged = (self.state.global_step + 1) % self.state.logging_steps == 0
        return not is_logged and bool(query_mask_BPT.any(1).float().mean() > MASS_FROM_SHARE)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's. The sums of an evaluation are its own: `predict` logs nothing and leaves its sums behind."""
        self._guidance_sums.pop("eval", None)
        self._metrics["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the guidance metrics since the last call: averages over guided rows (the share: over all)."""
        mode = "train" if self.model.training else "eval"
        sums = self._guidance_sums.pop(mode, None)
        if sums is not None:
            if mode == "train":
                sums = self.accelerator.reduce(sums, reduction="sum")
            loss, mass, guided, pointing, pointed, rows = sums.tolist()
            metrics = {"guided_share": guided / rows}
            if guided > 0:
                metrics["guidance_loss"] = loss / guided
                metrics["in_mask_mass"] = mass / guided
            if pointed > 0:
                metrics["pointing_accuracy"] = pointing / pointed
            for name, value in metrics.items():
                self._metrics[mode][name] = [value]
        super().log(logs, start_time)

    def record_rows(self, at_end: bool = False) -> None:
        """See `WatchedTrainer`; rows that could not be looked through before must have had a mask."""
        super().record_rows(at_end)
        rows = self.accelerator.reduce(self.unguided.counts[0].to(self.args.device), reduction="sum")
        looked_through = isinstance(self.train_dataset, Dataset) or not self.unguided.whole
        if at_end and self.args.guidance_weight > 0 and not looked_through and not rows:
            raise ValueError(
                f"Guidance was asked for (`guidance_weight` {self.args.guidance_weight:g}) and no row that was "
                "trained on has a mask. Give rows with `guidance`, or set `guidance_weight=0`."
            )

    def _probe_rows(self) -> list[dict[str, Any]]:
        guided = guided_flags(self.train_dataset).nonzero()[0][:PROBES]
        if not len(guided):
            raise ValueError("`probe_steps` draws rows with a mask, and the training set has none. Leave it at 0.")
        return [self.train_dataset[int(place)] for place in guided]

    # ---- Batches ----

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        """Trainer's; rows of our collator say which they are. Those of a stream have no place."""
        rows, order = dataset, sampler_fn
        if isinstance(self.data_collator, AgeVlmDataCollator) and hasattr(dataset, "__len__"):
            rows = PlacedRows(dataset, kwargs.get("dataloader_key") or description.lower())
            order = sampler_fn and (lambda _: sampler_fn(dataset))
        return super()._get_dataloader(rows, description, batch_size, order, **kwargs)

    def _prepare_inputs(self, inputs):
        """Trainer's; pictures that came as bytes are normalized on the device."""
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            inputs["pixel_values"] = self.data_collator.normalized(pixels)
        return inputs

    # ---- Cards ----

    def write_card(self, folder: Path) -> None:
        """Write our card, made from the folder's files."""
        write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's hook, called at each checkpoint: our card, made from the folder's files."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir))

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Trainer's makes the repository now and ends the run if it cannot; ours is made by the push itself."""
        self.hub_model_id = repository_name(self.args)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | None:
        """Save into the output folder and push it in one commit (`publish.py`); the main process gets the record.

        Raises:
            PushError: the folder stays complete, and `agevlm push` pushes it later.
            ValueError: `blocking=False`, which there is not.
        """
        if not blocking:
            raise ValueError("`push_to_hub` has no `blocking=False`: push from another process with `agevlm push`.")
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push(
            str(self.args.output_dir),
            repository_name(self.args),
            token=token or self.args.hub_token,
            private=(self.args.hub_private_repo if private is None else private) is not False,
            branch=revision or self.args.hub_revision,
            message=commit_message,
        )
