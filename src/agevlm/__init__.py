"""AGE-VLM: small vision-language models that look where they should.

The sub-packages live in the top-level folders of the repository (`modeling_agevlm/`, `processing/`, `training/`, ...)
and are installed as `agevlm.<folder>`; so does `checkpoints/`, two small models that come with the package. This
module stays light: importing it imports nothing else of the package.
"""

from pathlib import Path


__version__ = "0.1.0"

_CHECKPOINTS = Path(__file__).parent / "checkpoints"
TINY = _CHECKPOINTS / "agevlm-tiny"  # trained by `quickstart`
TINY_PARTS = _CHECKPOINTS / "tiny-parts"  # a pretrained tower and language model, which `quickstart` starts from
