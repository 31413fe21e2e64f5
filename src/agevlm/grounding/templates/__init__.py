"""The page of `agevlm ground view`."""
