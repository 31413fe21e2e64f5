"""Cards of models and data sets, rendered from the files in their folders."""

from .facts import read_facts
from .render import render_card, write_card


__all__ = ["read_facts", "render_card", "write_card"]
