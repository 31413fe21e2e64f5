"""Cards of models and data sets, rendered from the files in their folders."""

from .facts import EVALUATION_FILE, evaluation_fits, read_facts, weights_fingerprint
from .render import render_card, write_card


__all__ = [
    "EVALUATION_FILE",
    "evaluation_fits",
    "read_facts",
    "render_card",
    "weights_fingerprint",
    "write_card",
]
