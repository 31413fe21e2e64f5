"""Model cards rendered from run facts."""

from .render import render_card, write_card


__all__ = ["render_card", "write_card"]
