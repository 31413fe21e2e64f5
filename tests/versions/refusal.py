"""Loads a checkpoint under a transformers that is too old for it, and prints the ImportError that must come.

`python -I refusal.py CHECKPOINT model|processor`; one a process, because a failed import leaves traces.
"""

import sys

from transformers import AutoModel, AutoProcessor


if __name__ == "__main__":
    checkpoint, part = sys.argv[1:]
    auto_class = {"model": AutoModel, "processor": AutoProcessor}[part]
    try:
        auto_class.from_pretrained(checkpoint, trust_remote_code=True)
    except ImportError as error:
        print(error)
    else:
        raise SystemExit(f"the {part} loads: this version should have been refused")
