"""Stages over the processes of a torchrun, with the environment that `accelerate launch` makes of our configurations.

    torchrun --nproc_per_node 2 tests/helpers/scale_worker.py KIND FOLDER

KIND is a file of training/accelerate/. Runs a stage from FOLDER/start into FOLDER/KIND-ROWS for each of `DIVISIONS`.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from training_worker import IN_FLOAT32, make_rows, sharp_model

from agevlm.training.config import AgeVlmSFTConfig
from agevlm.training.run_stage import StageResult, run_stage
from agevlm.training.stages import stage3_ground
from agevlm.training.train import end_processes
from builders import save_tiny


# 4 rows a step over two processes that take turns: one process with text alone, a step of text alone, masks on one
# process alone. Rows have 1, 3 or 8 phrases.
KINDS = "3tit" + "tttt" + "g8ig" + "t1t3" + "iitg"
# Rows per process and batch: two batches accumulated, with a shorter last step, or one.
DIVISIONS = {1: KINDS + "ig", 2: KINDS}


SHARDING = {
    "fsdp2": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def run_scaled_stage(output_dir, start, kinds=KINDS, batch=4, sharding=None, callbacks=(), **changes) -> StageResult:
    """Stage 3, guided, of 4 rows a step in batches of `batch` rows, from the folder `start`."""
    recipe = stage3_ground.recipe().override(
        **IN_FLOAT32,
        mask_fraction=1.0,
        loss_spike=None,
        global_batch_size=4,
        per_device_train_batch_size=batch,
        logging_steps=1,
        learning_rate=1e-3,
        projector_learning_rate=3e-3,
        vision_learning_rate=3e-4,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **changes,
    )
    args = AgeVlmSFTConfig(**recipe.training_arguments(output_dir=str(output_dir)))
    if sharding is not None:
        # accelerate shards models on accelerators alone, though what it does then knows no device. It is told that
        # these processes had some; tensors stay on the CPU and collectives gloo's.
        PartialState._shared_state["distributed_type"] = sharding
        os.environ.pop("ACCELERATE_USE_CPU", None)
    return run_stage(recipe, output_dir, data=make_rows(kinds), init_from=start, args=args, callbacks=callbacks)


def save_start(folder: Path) -> None:
    """What the stages start from."""
    save_tiny(folder, sharp_model())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for batch, kinds in DIVISIONS.items():
        folder = arguments.folder / f"{arguments.kind}-{batch}"
        run_scaled_stage(folder, arguments.folder / "start", kinds, batch, SHARDING.get(arguments.kind))
    end_processes()
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main()
