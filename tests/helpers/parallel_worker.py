"""Models sharded over the processes of a torchrun. Each takes its own batch and writes what it got.

    torchrun --nproc_per_node 2 tests/helpers/parallel_worker.py FOLDER

FOLDER/tp and FOLDER/fsdp hold a checkpoint each, and `batches.pt`, a list with one batch per process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(kind: str, folder: Path) -> None:
    rank = dist.get_rank()
    model = AgeVlmForConditionalGeneration.from_pretrained(
        folder, distributed_config=DistributedConfig(**{f"{kind}_size": dist.get_world_size()})
    )
    batch = torch.load(folder / "batches.pt")[rank]
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    parameters = dict(model.named_parameters())
    result = {
        "logits": whole(output.logits).detach().clone(),
        "gradients": {name: whole(parameter.grad) for name, parameter in parameters.items()},
        "sharded": {name for name, parameter in parameters.items() if isinstance(parameter, DTensor)},
        "refusal": "",
    }
    try:
        model(**batch, guidance_query_mask=torch.ones_like(batch["input_ids"]))
    except ValueError as error:
        result["refusal"] = str(error)
    torch.save(result, folder / f"rank-{rank}.pt")
    dist.barrier()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in ("tp", "fsdp"):
        step(kind, folder / kind)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
