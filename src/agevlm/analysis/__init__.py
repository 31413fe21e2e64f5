"""Attention maps on pictures, and the report of a run."""
