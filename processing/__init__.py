"""Image processor and processor, registered with the Auto classes.

Only `image_processing_agevlm.py` and `processing_agevlm.py` travel with a checkpoint; this file does not, and is the
one place of the folder that knows the configuration (the Auto classes are keyed by it).

Without torchvision, `AgeVlmImageProcessor` is the class of the Pillow backend, as transformers does it with its own.
"""

from transformers import AutoImageProcessor, AutoProcessor
from transformers.utils import is_torchvision_available

from agevlm.modeling_agevlm.configuration_agevlm import AgeVlmConfig
from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessor, AgeVlmImageProcessorPil
from agevlm.processing.processing_agevlm import AgeVlmProcessor


if is_torchvision_available():
    _BACKENDS = {"torchvision": AgeVlmImageProcessor, "pil": AgeVlmImageProcessorPil}
else:
    _BACKENDS = {"pil": AgeVlmImageProcessorPil}
    AgeVlmImageProcessor = AgeVlmImageProcessorPil  # type: ignore[assignment,misc]

AutoImageProcessor.register(AgeVlmConfig, image_processor_classes=_BACKENDS, exist_ok=True)
AutoProcessor.register(AgeVlmConfig, AgeVlmProcessor, exist_ok=True)

__all__ = ["AgeVlmImageProcessor", "AgeVlmImageProcessorPil", "AgeVlmProcessor"]
