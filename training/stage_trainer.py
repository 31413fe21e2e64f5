"""The trainer of every stage and model: the order of rows, rates per part, checkpoints, lineage.

`StageTrainer` is `WatchedTrainer` with complete or invisible checkpoints (`checkpoints.py`) and a lineage file
in every saved folder. `AgeVlmSFTTrainer` adds guidance (`trainer.py`), `TwinTrainer` the twin's collator (`twin.py`).
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, unwrap_peft_model

from agevlm.models import reading
from agevlm.training.callbacks import WatchedTrainer
from agevlm.training.checkpoints import publish_folder, remove_leftovers, staging_folder
from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.freezing import part_of
from agevlm.training.lineage import write_lineage
from agevlm.training.sampling import make_sampler, set_sampler_epoch


class StageTrainer(WatchedTrainer):
    """TRL's `SFTTrainer` for a stage of either model.

    Args:
        args (`AgeVlmSFTConfig`): see there.
        lineage (`dict`, *optional*): JSON-ready facts about the run, saved as `agevlm_stage.json`.
        **kwargs: those of `SFTTrainer`.
    """

    args: AgeVlmSFTConfig
    model: PreTrainedModel
    frozen_tower: nn.Module | None = None  # a tower that takes features for pictures (`features.py`)

    def __init__(self, model: PreTrainedModel, args: AgeVlmSFTConfig, lineage: dict | None = None, **kwargs):
        self.lineage = lineage or {}
        self._staging: Path | None = None
        super().__init__(model=model, args=args, **kwargs)

    def write_card(self, folder: Path) -> None:
        """Write the model card of a saved folder. A model of transformers gets TRL's, with its checkpoints."""

    # ---- Order of rows ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Ours where it matters (`sampling.py`); Trainer's for plain random and sequential orders."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        step_rows = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return make_sampler(rows, self.args, step_rows) or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """None: evaluations keep the order of their rows. Trainer's `group_by_length` needs rows with `input_ids`."""

    def _run_epoch(self, *, train_dataloader, epoch, **kwargs):
        """Trainer's, with the rows in the order of the epoch for certain (`set_sampler_epoch`). A run that was killed
        after the checkpoint of its last step, within an epoch, trains no further: Trainer itself would go one step on.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        set_sampler_epoch(train_dataloader, epoch)
        super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)

    # ---- Optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, its groups (with or without weight decay) divided by parts with own rates."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rates = self.args.part_learning_rates
        if is_new and rates:
            names = {id(p): name for name, p in (self.model if model is None else model).named_parameters()}
            groups = []
            for group in optimizer.param_groups:
                by_rate = defaultdict(list)
                for parameter in group["params"]:
                    by_rate[rates.get(part_of(names[id(parameter)]), group["lr"])].append(parameter)
                groups += [{**group, "params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
            optimizer.param_groups = groups
        return optimizer

    # ---- Checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's, which only warns of weights that do not fit. Raises ValueError, naming a damaged checkpoint."""
        with reading(resume_from_checkpoint, "its weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(unwrap_peft_model(self.model), "all_tied_weights_keys", {})
        missing = [key for key in load_result.missing_keys if key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"{len(missing)} tensors are missing, {len(load_result.unexpected_keys)} are unexpected, first "
                f"{[*missing, *load_result.unexpected_keys][0]}"
            )

    def _get_output_dir(self, trial) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's checkpoint, written to a temporary place and renamed to `checkpoint-N` when complete."""
        run_folder = Path(self._get_output_dir(trial))
        staging, name = staging_folder(run_folder), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = staging / name, run_folder / name
        if self.args.should_save:
            remove_leftovers(run_folder)
        self.record_rows()  # a resumed run finds the rows that were skipped before
        self.accelerator.wait_for_everyone()
        try:
            self._staging = staging
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_global_step:
            # Trainer has looked for it among the temporary folders.
            best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish_folder(staged, final)
            remove_leftovers(run_folder)
            rotate_checkpoints(
                str(run_folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's (model, code, processor), with the lineage file and, of ours, the model card."""
        if state_dict is not None:
            # Gathered from shards, tied weights are two tensors.
            tied = unwrap_peft_model(self.model).all_tied_weights_keys
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        # A fast tokenizer saves the truncation and padding of its last call, which decide no later one.
        self.processing_class.tokenizer.backend_tokenizer.no_truncation()
        self.processing_class.tokenizer.backend_tokenizer.no_padding()
        with own_class(self.model):
            super()._save(output_dir, state_dict)
        folder = Path(str(output_dir if output_dir is not None else self.args.output_dir))
        if not self.args.should_save:
            return
        # A pickle that only this package can read; the lineage file says the same in JSON.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.lineage:
            write_lineage(folder, self.lineage)
        self.write_card(folder)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Gives a model sharded by FSDP2 its own class back for a while: its saved code would be torch's otherwise."""
    sharded = type(model)
    try:
        model.__class__ = next(c for c in sharded.__mro__ if not issubclass(c, FSDPModule))  # type: ignore[assignment]
        yield
    finally:
        model.__class__ = sharded
