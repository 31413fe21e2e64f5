"""Defaults of the conversion and of the check."""

MAX_LENGTH = 1024  # tokens of a row: TRL's default
ROWS_PER_SHARD = 5_000
