"""Data sets of others: read, checked, converted to rows of ours."""
