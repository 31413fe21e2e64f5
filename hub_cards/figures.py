"""The loss curve of a run, drawn from Trainer's log."""

from collections.abc import Mapping, Sequence
from pathlib import Path


LOSSES = {"loss": "training loss", "guidance_loss": "of it: guidance", "eval_loss": "validation loss"}
LOOKING = {"in_mask_mass": "attention inside the mask", "pointing_accuracy": "points at the object"}


def draw_losses(log_history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Draw the losses over steps, and where rows are guided how much the model looks at their masks.

    Returns:
        Whether there was anything to draw: at least two logged steps.
    """
    curves = {
        name: [(entry["step"], entry[name]) for entry in log_history if name in entry and "step" in entry]
        for name in (*LOSSES, *LOOKING)
    }
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves.keys() & LOSSES.keys():
        return False
    # Only here, as the help of a verb waits for no Matplotlib; not pyplot, which would look for a display
    from matplotlib.figure import Figure

    from agevlm.drawing import save_figure

    panels = [LOSSES] + ([LOOKING] if curves.keys() & LOOKING.keys() else [])
    figure = Figure(figsize=(5 * len(panels), 3.2), dpi=120, layout="constrained")
    for axes, titles in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, title in titles.items():
            if name in curves:
                axes.plot(*zip(*curves[name], strict=True), label=title, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, path)
    return True
