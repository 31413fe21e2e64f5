"""Learning curves: yes/no questions about pictures, answered every so many steps of a stage, in Trainer's log.

A point is an entry of the log with `presence` (share of right answers), `presence_yes` (share answered Yes) and
`questions` (assistant turns that the stage has trained on so far). The answer is the larger of the logits of Yes and
No where the answer begins: one forward pass, no text is generated. The weights stay equal bit for bit.

Use other questions than those that are reported, because settings are chosen by this curve.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback

from agevlm.data.rows import content_digest, undecoded
from agevlm.data.scenes.build import load_benchmark
from agevlm.data.scenes.questions import YES_NO_SUFFIXES
from agevlm.data.tables import check_columns, load_table
from agevlm.images import open_image
from agevlm.models import encode, messages, render


YES, NO = "Yes", "No"
BATCH = 100  # questions at once
COLUMNS = ("image", "question", "answer")
QUESTIONS, PRESENCE = "questions", "presence"  # in the log; the first also in the state of a checkpoint


@dataclass(frozen=True)
class CurveQuestions:
    """Questions with the answer Yes or No.

    Args:
        name: without the place of its file.
        rows: `image` (as it is stored), `question`, `answer`.
    """

    name: str
    rows: Dataset

    @cached_property
    def yes(self) -> torch.Tensor:
        """Which answers are Yes: (rows,) bool."""
        return torch.tensor([answer.lower() == YES.lower() for answer in self.rows["answer"]])

    @cached_property
    def stated(self) -> dict[str, Any]:
        """The inputs of a curve other than the run, JSON-ready."""
        facts = {"rows": self.name, "number": len(self.rows), "yes": int(self.yes.sum()) / len(self.yes)}
        return {**facts, "digest": content_digest(self.rows, COLUMNS)}


def read_questions(place: str | Path | Dataset) -> CurveQuestions:
    """The questions of a curve.

    Args:
        place: a folder of scenes: its POPE questions about color and name pairs that no training row shows; a Parquet
            file or a set of the Hub with the columns `image`, `question`, `answer`; or such rows.

    Raises:
        ValueError: nothing of that name, no rows, a missing column, or an answer that is neither Yes nor No.
    """
    if isinstance(place, Dataset):
        name, rows = "rows", place
    elif (Path(place) / "scenes.json").is_file():
        name, rows = Path(place).name, load_benchmark(place, "composition", "pope")
    else:
        rows = load_table(str(place), usual=("test", "validation", "train"))
        name = Path(place).name if Path(place).exists() else str(place)
    check_columns(name, rows.column_names, COLUMNS)
    if not len(rows):
        raise ValueError(f"{name} holds no questions; give another file or data set")
    for index, answer in enumerate(rows["answer"]):
        if answer.lower() not in (YES.lower(), NO.lower()):
            raise ValueError(f"{name}, row {index}, field answer: {answer!r} is neither Yes nor No; leave the row out")
    return CurveQuestions(name, undecoded(rows.select_columns(list(COLUMNS))))


def answer_tokens(processor: Any) -> tuple[int, int]:
    """The tokens with which the answers Yes and No begin.

    Raises:
        ValueError: they begin alike, or with tokens that the header of an answer does not end before.
    """
    asked = messages("Is there a car?")
    replies = [{"role": "assistant", "content": [{"type": "text", "text": answer}]} for answer in (YES, NO)]
    texts = [processor.apply_chat_template([*asked, reply], tokenize=False) for reply in replies]
    yes, no, header = (
        processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (*texts, render(processor, asked[0]["content"][-1]["text"]))
    )
    place = len(header)
    if yes[:place] != header or no[:place] != header or yes[place] == no[place]:
        raise ValueError(
            "A learning curve compares the first tokens of Yes and No, and in this tokenizer and chat template they "
            f"do not begin apart right behind the header of the answer: {yes[place - 1 :]} and {no[place - 1 :]} "
            f"behind {header[-3:]}. Leave `answers` out."
        )
    return yes[place], no[place]


def answer_turns(labels: torch.Tensor) -> int:
    """How many assistant turns `labels (B, T)` hold: runs of tokens that are learned."""
    learned = nn.functional.pad(labels != -100, (1, 0))
    return int((learned[:, 1:] & ~learned[:, :-1]).sum())


class LearningCurve(TrainerCallback):
    """Answers the questions before the first step, every so many steps and behind the last one.

    All processes compute (parameters may be sharded). A tower that the trainer knows to be frozen sees the pictures
    once.

    Args:
        trainer: a `StageTrainer`, which counts the `turns` of a step.
        every: optimizer steps between two points.

    Raises:
        ValueError: see `answer_tokens`.
    """

    def __init__(self, trainer: Any, questions: CurveQuestions, every: int):
        self.trainer, self.questions, self.every = trainer, questions, every
        self.tokens = list(answer_tokens(trainer.processing_class))
        self.seen = 0
        self.kept: dict[int, dict[str, torch.Tensor]] = {}  # batches with features

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen = state.stateful_callbacks.get(QUESTIONS, 0)
        if state.global_step == 0:
            self.log_point(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        turns = torch.tensor(self.trainer.turns, device=args.device)
        self.seen += int(self.trainer.accelerator.reduce(turns, reduction="sum")) // self.trainer.get_tp_size()
        state.stateful_callbacks[QUESTIONS] = self.seen
        if state.global_step % self.every == 0 or control.should_training_stop:
            self.log_point(model)

    def log_point(self, model: nn.Module) -> None:
        said, right = self.answer(model), self.questions.yes
        point = {
            PRESENCE: int((said == right).sum()) / len(said),
            f"{PRESENCE}_yes": int(said.sum()) / len(said),
            QUESTIONS: self.seen,
        }
        control = self.trainer.control
        due = control.should_log
        Trainer.log(self.trainer, point)  # TRL's and ours would add what the next entry of training is to say
        control.should_log = due

    @torch.no_grad()
    def answer(self, model: nn.Module) -> torch.Tensor:
        """Which questions are answered with Yes: (rows,) bool."""
        was_training, said = model.training, []
        model.eval()
        for start in range(0, len(self.questions.rows), BATCH):
            with self.trainer.compute_loss_context_manager():
                logits = model(**self._batch(model, start), logits_to_keep=1).logits[:, -1]
            said.append((logits[:, self.tokens[0]] > logits[:, self.tokens[1]]).cpu())
        model.train(was_training)
        return torch.cat(said)

    def _batch(self, model: Any, start: int) -> dict[str, torch.Tensor]:
        """The model's inputs for the questions from `start` on, with features in the place of pictures where the tower
        is frozen (`features.py`). They are kept."""
        if start in self.kept:
            return {name: value.to(model.device) for name, value in self.kept[start].items()}
        processor, name = self.trainer.processing_class, self.questions.name
        rows = self.questions.rows.select(range(start, min(start + BATCH, len(self.questions.rows)))).to_list()
        images = [
            open_image(row["image"], f"{name}, row {start + index}, field image") for index, row in enumerate(rows)
        ]
        texts = [render(processor, row["question"] + YES_NO_SUFFIXES[0]) for row in rows]
        batch = encode(model, processor, images, texts)
        tower = self.trainer.frozen_tower
        if tower is not None:
            features = tower(batch["pixel_values"].flatten(0, 1)).last_hidden_state
            batch["pixel_values"] = features[:, None, None]
            self.kept[start] = {name: value.cpu() for name, value in batch.items()}
        return batch
