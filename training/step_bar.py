"""The bar of a training's steps, with its losses, in place of the dictionaries that Trainer prints."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from agevlm.progress import Bar
from agevlm.training.curve import PRESENCE


class StepBar(TrainerCallback):
    """Steps, time left, losses and the learning curve's last point; a line now and then where nobody sees a bar.

    Args:
        name: what the bar is of.
    """

    def __init__(self, name: str):
        self.name, self.bar = name, Bar(disable=True)
        self.shown: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        hidden, step = args.disable_tqdm or not state.is_world_process_zero, state.global_step
        self.bar = Bar(total=state.max_steps, initial=step, desc=self.name, unit="step", disable=hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {key: value for key, value in logs.items() if key.endswith("loss") or key == PRESENCE}
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def use_step_bar(trainer: Trainer, name: str) -> StepBar:
    """Trainer's own callbacks that print give way to a bar."""
    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(bar := StepBar(name))
    return bar
