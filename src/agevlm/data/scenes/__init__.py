"""The embedded data set: drawn scenes with exact masks and questions (docs/design.md, tiny size)."""
