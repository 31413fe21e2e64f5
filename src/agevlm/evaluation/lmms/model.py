"""Models as lmms-eval sees them: any that `agevlm eval` loads, answering in batches by its own generation.

Deviation: greedy decoding alone; what a task asks of temperature or beams is refused rather than passed over.
"""

from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from lmms_eval.api.model import lmms
from tqdm import tqdm

from agevlm.evaluation.generate import answer_batch
from agevlm.evaluation.processes import current_device
from agevlm.models import load


class AgeVlmLmms(lmms):
    """`--model agevlm --model_args pretrained=FOLDER[,adapter=...][,four_bit=True][,trust_remote_code=True]`."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        adapter: str | None = None,
        four_bit: bool = False,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"unknown model_args {', '.join(unknown)}; see AgeVlmLmms")
        self.model, self.processor = load(
            pretrained,
            revision=revision,
            adapter=adapter,
            four_bit=four_bit,
            trust_remote_code=trust_remote_code,
            device_map=current_device(),
        )
        if device is not None:
            self.model.to(device)
        self.batch_size_per_gpu = int(batch_size)
        self._rank, self._world_size = PartialState().process_index, PartialState().num_processes

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        answers: dict[int, str] = {}
        # prompts of one length limit go together
        order = sorted(range(len(requests)), key=lambda index: _limit(requests[index].args[1]))
        bar = tqdm(total=len(requests), desc="agevlm", unit="row", disable=self._rank > 0)
        while order:
            limit = _limit(requests[order[0]].args[1])
            batch = [i for i in order[: self.batch_size_per_gpu] if _limit(requests[i].args[1]) == limit]
            order = order[len(batch) :]
            prompts, images = [], []
            for index in batch:
                context, _, doc_to_visual, doc_id, task, split = requests[index].args
                visuals = doc_to_visual(self.task_dict[task][split][doc_id])
                if len(visuals) > 1:
                    raise ValueError(f"{task}, row {doc_id}: {len(visuals)} pictures; this model is asked about one")
                prompts.append(context)
                images.append(visuals[0] if visuals else None)
            outputs = answer_batch(self.model, self.processor, images, prompts, limit)
            for index, output in zip(batch, outputs, strict=True):
                answers[index] = _cut(output, requests[index].args[1].get("until"))
            bar.update(len(batch))
        bar.close()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("agevlm answers in text; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("agevlm answers one question; tasks of several rounds are not supported")


def _limit(settings: dict[str, Any]) -> int:
    if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) != 1:
        raise ValueError(f"only greedy decoding is offered, the task asks for {settings}")
    return settings.get("max_new_tokens", 128)


def _cut(output: str, until: str | Sequence[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or []:
        if end:
            output = output.split(end, 1)[0]
    return output
