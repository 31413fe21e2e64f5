"""A Hugging Face Space that shows where a model looks: `agevlm demo` for the model named by AGEVLM_MODEL."""

import os

from agevlm.cli import dispatch


model = os.environ.get("AGEVLM_MODEL")  # without one, the tiny checkpoint that comes with the package
dispatch(["demo", *filter(None, [model]), "--host", "0.0.0.0"])
