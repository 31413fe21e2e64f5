"""Tiny published checkpoints of ConvLLaVA and MobileVLM V2, and how a converted one is asked.

`published_baselines.py` knows the published layouts and what their authors' code does; the sizes stand here.
"""

from pathlib import Path

import published_baselines as published
import torch
from PIL import Image


DEPTHS, WIDTHS, CONVLLAVA_SIZE = [1, 1, 1, 1, 2], [8, 16, 16, 32, 48], 320  # 5 x 5 tokens of 64 pixels
CONVNEXT = published.convnext(DEPTHS, WIDTHS)
CLIP = published.clip(width=128, mlp=64, layers=2, heads=2, patch=2, size=48)
HIDDEN, MLP, LAYERS, HEADS = 32, 48, 2, 4
QUESTION = "Is there a red apple in the image?"
LLAVA = {"model_type": "llava", "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "rms_norm_eps": 1e-5}
SYSTEMS = ("convllava", "mobilevlm-v2")


def language_config(vocabulary: int) -> dict:
    return {
        **LLAVA, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": vocabulary,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


class Published:
    """A tiny published checkpoint: its folder, its weights, and what its authors' code makes of a question."""

    def __init__(self, folder: Path, system: str, words: bytes, vocabulary: int, bins: bool = False):
        self.system, self.words, self.folder = system, words, folder / "published"
        self.config = language_config(vocabulary)
        llama = published.llama_shapes(HIDDEN, MLP, LAYERS, vocabulary, rotary=system == "mobilevlm-v2")
        if system == "convllava":
            self.size = CONVLLAVA_SIZE
            tower = CONVNEXT
            # the tower that the loader takes: another one, without the pooled vector's norm
            bare = published.shapes_of(published.ConvNextModel, tower)
            bare = {name: shape for name, shape in bare.items() if not name.startswith("layernorm.")}
            self.tower = published.random_weights(bare, seed=5)
            stated = {"model_type": "convnext", "depths": DEPTHS, "hidden_sizes": WIDTHS, "hidden_act": "gelu"}
            published.save_folder(folder / "tower", self.tower, stated, bins=bins)
            self.config |= {
                "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1, "mm_vision_resolution": self.size,
                "mm_vision_tower": str(folder / "tower"),
            }  # fmt: skip
        else:
            self.size, tower = CLIP.image_size, CLIP
            self.config |= {
                "mm_projector_type": "ldpnetv2", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            }  # fmt: skip
        self.weights = published.random_weights(published.system_shapes(llama, tower))
        published.save_folder(self.folder, self.weights, self.config, words, bins)
        self.language = published.llama(self.weights, self.config)

    def cells(self, image: Image.Image, tower: dict | None = None) -> torch.Tensor:
        """The picture's tokens (1, cells, width)."""
        pixels = published.pixels(image, self.size)
        if self.system == "convllava":
            return published.convllava_picture(self.weights, tower or self.tower, CONVNEXT, pixels)
        return published.mobilevlm_picture(self.weights, CLIP, pixels)

    @torch.no_grad()
    def logits(self, image: Image.Image | None, turns: list[str], tower: dict | None = None) -> torch.Tensor:
        """(1, tokens, words) of the whole text, asked about a picture or without one."""
        return self._logits(published.token_ids(self.words, published.prompt(turns, image is not None)), image, tower)

    def _logits(self, ids: list[int], image: Image.Image | None, tower: dict | None = None) -> torch.Tensor:
        if image is None:
            return self.language(torch.tensor([ids])).logits
        return self.language(inputs_embeds=published.splice(self.language, ids, self.cells(image, tower))).logits

    @torch.no_grad()
    def states(self, image: Image.Image, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        """After the final norm, (cells, width) of the picture and (tokens, width) of the question."""
        ids = published.token_ids(self.words, published.prompt([question]))
        cells = self.cells(image)
        states = self.language.model(inputs_embeds=published.splice(self.language, ids, cells)).last_hidden_state[0]
        first = ids.index(-200)
        behind = first + cells.shape[1] + 2  # the space and the line break
        return states[first : behind - 2], states[behind : behind + self.length(question)]

    def length(self, question: str) -> int:
        """In tokens, behind the line break."""
        return len(published.token_ids(self.words, f"\n{question}")) - 3  # without `<s>`, the space, the line break

    @torch.no_grad()
    def continuation(self, image: Image.Image | None, question: str, steps: int) -> list[int]:
        """Greedy, without a cache: every token's answer is a forward pass over the whole text."""
        ids: list[int] = []
        while len(ids) < steps and ids[-1:] != [2]:
            prompt = published.token_ids(self.words, published.prompt([question], image is not None)) + ids
            ids.append(self._logits(prompt, image)[0, -1].argmax().item())
        return ids


def conversation(image: Image.Image | None, turns: list[str]) -> list[dict]:
    """User's and assistant's turns in alternation, in transformers' format, the picture in the first."""
    pictures = [] if image is None else [{"type": "image", "image": image}]
    first = {"role": "user", "content": [*pictures, {"type": "text", "text": turns[0]}]}
    roles = ("user", "assistant")
    rest = [{"role": roles[n % 2], "content": [{"type": "text", "text": turn}]} for n, turn in enumerate(turns)]
    return [first, *rest[1:]]


def encode(processor, conversations: list[list[dict]]):
    """A left-padded batch up to the next answer."""
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
