"""The published parts that `agevlm init` starts from, and their size."""

# Instruct: the embeddings stay frozen for three stages, and the base model has never seen the tokens of a chat.
LANGUAGE_MODEL = "meta-llama/Llama-3.2-1B-Instruct"
# The image tower of laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup alone, published as safetensors.
VISION_TOWER = "timm/convnext_large_mlp.clip_laion2b_ft_soup_320"
IMAGE_SIZE = 768
