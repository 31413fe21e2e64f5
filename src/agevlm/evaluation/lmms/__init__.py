"""lmms-eval plugin (extra `lmms`): our models in its runs, and five tasks that are scored by our functions.

    lmms_eval --model agevlm --model_args pretrained=checkpoints/agevlm-tiny --tasks agevlm_pope \
        --include_path evaluation/lmms/tasks --batch_size 32

The tasks are the protocol `paper`; lmms-eval's own tasks run on the same model for comparison.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("agevlm", simple_class_path="agevlm.evaluation.lmms.model.AgeVlmLmms")
