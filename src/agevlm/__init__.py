"""AGE-VLM: small vision-language models that look where they should.

The sub-packages live in the top-level folders of the repository (`modeling_agevlm/`, `processing/`, `training/`, ...)
and are installed as `agevlm.<folder>`. This module stays light: importing it imports nothing else.
"""

__version__ = "0.1.0"
