"""The model, registered with the Auto classes.

The files `*_agevlm.py` travel with a checkpoint; this file does not.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from agevlm.modeling_agevlm.configuration_agevlm import AgeVlmConfig
from agevlm.modeling_agevlm.modeling_agevlm import AgeVlmForConditionalGeneration, AgeVlmModel, AgeVlmPreTrainedModel


AutoConfig.register(AgeVlmConfig.model_type, AgeVlmConfig, exist_ok=True)
# `AutoModel` gives the model with its head, so that `.generate` works on what users of this repository load.
AutoModel.register(AgeVlmConfig, AgeVlmForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(AgeVlmConfig, AgeVlmForConditionalGeneration, exist_ok=True)

__all__ = ["AgeVlmConfig", "AgeVlmForConditionalGeneration", "AgeVlmModel", "AgeVlmPreTrainedModel"]
