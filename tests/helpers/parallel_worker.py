"""Models sharded over the processes of a group. Each takes its own batch and writes what it got.

FOLDER/tp and FOLDER/fsdp hold a checkpoint each, and `batches.pt`, a list with one batch per process.
"""

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


def run(folder: Path) -> None:
    """What each process of the group runs."""
    dist.init_process_group("gloo")
    for kind in ("tp", "fsdp"):
        step(kind, folder / kind)
