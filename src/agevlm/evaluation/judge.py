"""The judged column: a chat model reads which answer an output gives, and never guesses.

Where answers are closed (yes/no, lettered options) the judge is shown question and output, not the right answer, and
names the option or "none"; what it names is scored as if the rule had found it. Where they are free it is shown the
right answer too and says correct, incorrect or unclear. It must reply with one of these words and nothing else:
anything else is "unjudged", counted, and wrong. An empty output is "none" without asking.

Greedy (temperature 0), and every reply is kept on disk under a digest of judge and prompt, so that the same output is
judged once. Deviation: the paper names its judge "Qwen-L" and neither version nor prompt; the default here is
Qwen2.5-7B-Instruct with the prompts below.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer

from agevlm.models import TOKENIZER, load_weights, reading, weights_digest
from agevlm.progress import Bar
from agevlm.stats import share
from agevlm.store import Journal, digest, read_lines

from .benchmark import RIGHT, WRONG, Answers, Benchmark, Metrics, Row
from .processes import current_device, is_main, my_share


NONE, UNCLEAR = "none", "unclear"
_CLOSED = """A model was asked a question about a picture. Say which answer its reply gives, or none if it gives no \
answer or several. Do not answer the question yourself.

Question: {question}

Reply: {output}

Write one of these words and nothing else: {labels}"""
_FREE = """A model was asked a question about a picture. Say whether its reply agrees with the right answer: correct \
if it does, incorrect if it contradicts it, unclear if it says nothing definite.

Question: {question}

Right answer: {gold}

Reply: {output}

Write one of these words and nothing else: {labels}"""
_NEW_TOKENS = 8


def labels_of(benchmark: Benchmark, row: Row) -> tuple[str, ...]:
    """What the judge may reply."""
    closed = benchmark.labels(row)
    return (*closed, NONE) if closed else (RIGHT, WRONG, UNCLEAR)


def judge_prompt(benchmark: Benchmark, row: Row, output: str) -> str:
    """What the judge is asked. Closed answers: without the right one."""
    labels = ", ".join(labels_of(benchmark, row))
    question = benchmark.prompt(row)
    if benchmark.labels(row):
        return _CLOSED.format(question=question, output=output, labels=labels)
    return _FREE.format(question=question, gold=benchmark.gold(row), output=output, labels=labels)


def read_reply(reply: str, labels: Sequence[str]) -> str | None:
    """The label that a reply is, whatever its case and the signs around it; None for any other reply."""
    word = reply.strip().strip("\"'*()[].:,! ").casefold()
    return {label.casefold(): label for label in labels}.get(word)


class Judge:
    """A chat model of transformers with its replies on disk.

    Args:
        name: folder or Hub id.
        cache: folder that keeps replies as JSON lines; each process appends to a file of its own.
    """

    def __init__(self, name: str, cache: str | Path, batch_size: int = 32):
        with reading(name, TOKENIZER):
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.model = load_weights(AutoModelForCausalLM, name, dtype="auto", device_map=current_device()).eval()
        if self.tokenizer.chat_template is None:
            raise ValueError(f"the judge {name} has no chat template; give a chat model")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.name, self.batch_size, self.cache = name, batch_size, Path(cache)
        self.digest = weights_digest(self.model)
        self.replies: dict[str, str] = {}
        for path in sorted(self.cache.glob("replies.*.jsonl")):
            self.replies |= {entry["key"]: entry["reply"] for entry in read_lines(path)}

    def key(self, prompt: str) -> str:
        return digest(f"{self.digest}\n{prompt}")

    def ask(self, prompts: Sequence[str], progress: bool = True) -> list[str]:
        """Replies in the order of `prompts`; those on disk are not asked again, the others shared among processes."""
        new = my_share([prompt for prompt in dict.fromkeys(prompts) if self.key(prompt) not in self.replies])
        found = []
        with (
            Bar(total=len(new), desc="judge", unit="row", disable=not progress or not is_main()) as bar,
            Journal(self.cache / f"replies.{PartialState().process_index}.jsonl") as journal,
        ):
            for start in range(0, len(new), self.batch_size):
                batch = new[start : start + self.batch_size]
                entries = [
                    {"key": self.key(prompt), "reply": reply}
                    for prompt, reply in zip(batch, self._generate(batch), strict=True)
                ]
                journal.append(entries)
                found += entries
                bar.update(len(batch))
        self.replies.update((entry["key"], entry["reply"]) for entry in gather_object(found))
        return [self.replies[self.key(prompt)] for prompt in prompts]

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[str]) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        batch = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        # temperature and top_p of the checkpoint's own settings have no say in greedy decoding
        tokens = self.model.generate(
            **batch, max_new_tokens=_NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return self.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def judge_rows(
    judge: Any, benchmark: Benchmark, rows: Sequence[Row], outputs: Sequence[str], progress: bool = True
) -> list[dict[str, Any]]:
    """One {id, reply, label} per row; `label` None is unjudged, `reply` None was not asked.

    `judge`: a [`Judge`], or anything with its `ask`.
    """
    asked = [index for index, output in enumerate(outputs) if output.strip()]
    replies = judge.ask([judge_prompt(benchmark, rows[index], outputs[index]) for index in asked], progress)
    found: dict[int, str] = dict(zip(asked, replies, strict=True))
    lines = []
    for index, row in enumerate(rows):
        labels, reply = labels_of(benchmark, row), found.get(index)
        label = labels[-1] if reply is None else read_reply(reply, labels)
        lines.append({"id": row["id"], "reply": reply, "label": label})
    return lines


def _found(
    benchmark: Benchmark, rows: Sequence[Row], parsed: Answers, labels: Answers
) -> tuple[list[str | None], np.ndarray]:
    """Answers and credits out of the judge's labels. What is free keeps the rule's reading, and earns what the judge
    says."""
    answers: list[str | None] = []
    credits = np.zeros(len(rows))
    for index, (row, rule, label) in enumerate(zip(rows, parsed, labels, strict=True)):
        if label in (None, NONE, UNCLEAR):
            answers.append(None)
        else:
            answers.append(label if benchmark.labels(row) else rule or label)
        if benchmark.labels(row):
            credits[index] = benchmark.is_correct(row, answers[-1])
        elif label is not None:
            credits[index] = benchmark.credit(row, label)
    return answers, credits


def score_judged(benchmark: Benchmark, rows: Sequence[Row], parsed: Answers, labels: Answers) -> Metrics:
    """The judged column.

    Returns:
        The benchmark's metrics and `intervals` as the judge reads the outputs; `unjudged` (percent of replies that are
        none of the words); `agreement` (percent of rows on which judge and rule come to the same verdict, of those
        that both could read; None if there are none) over `agreement_n` rows; and `rule_then_judge`, the metrics where
        the judge reads only what the rule could not, with its `share_judged`.
    """
    answers, credits = _found(benchmark, rows, parsed, labels)
    by_rule = benchmark.credits(rows, parsed)
    both = np.array([a is not None and b is not None for a, b in zip(parsed, answers, strict=True)])
    unread = np.array([answer is None for answer in parsed])
    mixed = [judged if rule is None else rule for rule, judged in zip(parsed, answers, strict=True)]
    mixed_credits = np.where(unread, credits, by_rule)
    agreement = float(100 * (by_rule[both] == credits[both]).mean()) if both.any() else None
    return {
        **benchmark.score(rows, answers, credits),
        "intervals": benchmark.intervals(rows, answers, credits),
        "unjudged": share([label is None for label in labels]).value(),
        "agreement": agreement,
        "agreement_n": int(both.sum()),
        "rule_then_judge": {
            **benchmark.score(rows, mixed, mixed_credits),
            "share_judged": share(unread).value(),
        },
    }
