"""What makes training on a CPU fast where libraries have accelerators in mind.

TRL's fused head scores every token where it has no Triton kernel, and answers are a tenth of a conversation: with a
vocabulary of 49,000 and a width of 576 the head took 40 % of a step. And the backward pass of torch's SDPA kernel in
bfloat16 takes four times as long as eager attention (both measured at SmolLM2-135M's shape, one core with AVX-512).
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import unwrap_peft_model
from trl import SFTTrainer


def attention_kernel(args: TrainingArguments) -> str | None:
    """The `attn_implementation` that trains fastest, None for transformers' default."""
    return "eager" if args.bf16 and args.device.type == "cpu" else None


class AnswerHeadTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, its loss and gradients; the backbone hands the states that have a label to the head."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._answered_BT: torch.Tensor | None = None
        backbone: nn.Module = unwrap_peft_model(self.model).base_model
        self._answer_hook = backbone.register_forward_hook(self._keep_answered)

    def release_model(self) -> None:
        """Take the fused head and the hook off the model, so that it can be used or trained again like a new one."""
        self._answer_hook.remove()
        unwrap_peft_model(self.accelerator.unwrap_model(self.model)).__dict__.pop("forward", None)

    def _keep_answered(self, backbone: nn.Module, args: tuple, output: Any) -> Any:
        if self._answered_BT is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self._answered_BT][None]
            self._answered_BT = None
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's."""
        needs_logits = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        if self.model.training and self.args.device.type == "cpu" and not (needs_logits or self.args.torch_compile):
            labels_BT = inputs.pop("labels")[:, 1:]
            self._answered_BT = labels_BT != -100
            inputs["shift_labels"] = labels_BT[self._answered_BT][None]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
