"""What a run can choose from: backends with their checkpoints, and texts to ground."""

FLORENCE2, GROUNDING_DINO = "florence-community/Florence-2-large", "IDEA-Research/grounding-dino-base"
SAM, SAM2, SAM3 = "facebook/sam-vit-huge", "facebook/sam2.1-hiera-large", "facebook/sam3"
# name: (grounder, segmenter)
CHECKPOINTS: dict[str, tuple[str | None, str | None]] = {
    "florence2+sam2": (FLORENCE2, SAM2),
    "florence2+sam": (FLORENCE2, SAM),
    "florence2-phrases+sam2": (FLORENCE2, SAM2),
    "grounding-dino+sam2": (GROUNDING_DINO, SAM2),
    "sam3": (None, SAM3),
    "exact": (None, None),
}
QUERY_SOURCES = ("caption", "question", "question+answer")
