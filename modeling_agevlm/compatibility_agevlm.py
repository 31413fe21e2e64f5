"""The versions of transformers that AGE-VLM runs on, and what differs between them.

Each file that travels with a checkpoint imports this one before anything else: where transformers is too old, its user
reads one sentence instead of the name of whatever is missing first.

The code follows the newest version. Before 5.24 the cache of keys and values is called `past_key_values` wherever it
is an argument or a field of an output; since 5.24 it is called `cache`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import transformers
from packaging.version import Version
from transformers.utils import logging


# `make test-versions` measures both ends.
MINIMUM = "5.10"
NEWEST_TESTED = "5.24"

_installed = Version(transformers.__version__)
if _installed < Version(MINIMUM):
    raise ImportError(
        f"AGE-VLM needs transformers >= {MINIMUM} (this is {transformers.__version__}): pip install -U transformers"
    )
if _installed.release[:2] > Version(NEWEST_TESTED).release:
    # A logger of transformers', so that the copies of this file that one checkpoint loads warn once together.
    logging.get_logger("transformers.agevlm").warning_once(
        f"AGE-VLM has been tested with transformers {MINIMUM} to {NEWEST_TESTED}; this is {transformers.__version__}."
    )

# The name of the cache in arguments of transformers' layers and masks, and in the fields of its outputs.
CACHE = "cache" if _installed >= Version("5.24.dev0") else "past_key_values"


def sub_config_specs(**parts: tuple[type, dict[str, Any]]) -> dict[str, Any]:
    """A configuration's `sub_configs_defaults`, which transformers leaves out of `config.json`; new in 5.20.

    Args:
        **parts: field -> (class, its arguments where nothing is given).
    """
    try:
        from transformers.configuration_utils import SubConfigSpec
    except ImportError:
        return {}
    return {name: SubConfigSpec(config_class=kind, init_kwargs=defaults) for name, (kind, defaults) in parts.items()}


def accepts_past_key_values(forward: Callable) -> Callable:
    """A `forward` with an argument `cache` that accepts it as `past_key_values` too. That is what older versions call
    it; newer ones warn.

    Raises:
        ValueError: both are given, as by an older `generate` that does not know `cache`.
    """
    if CACHE == "cache":
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)

    @wraps(forward)
    def renamed(self, *args, **kwargs) -> Any:
        if "past_key_values" in kwargs:
            if kwargs.get("cache") is not None:
                raise ValueError("Give the cache as `past_key_values`: this transformers knows no other name for it.")
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(self, *args, **kwargs)

    return renamed
