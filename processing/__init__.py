"""Image processor and processor, registered with the Auto classes.

Only `image_processing_agevlm.py` and `processing_agevlm.py` travel with a checkpoint; this file does not, and is the
one place of the folder that knows the configuration (the Auto classes are keyed by it).
"""

from transformers import AutoImageProcessor, AutoProcessor

from agevlm.modeling_agevlm.configuration_agevlm import AgeVlmConfig
from agevlm.processing.image_processing_agevlm import AgeVlmImageProcessor
from agevlm.processing.processing_agevlm import AgeVlmProcessor


AutoImageProcessor.register(AgeVlmConfig, AgeVlmImageProcessor, exist_ok=True)
AutoProcessor.register(AgeVlmConfig, AgeVlmProcessor, exist_ok=True)

__all__ = ["AgeVlmImageProcessor", "AgeVlmProcessor"]
