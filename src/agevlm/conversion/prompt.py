"""The prompt format of ConvLLaVA and MobileVLM V2, `vicuna_v1`, token for token, and their pictures.

Both repositories cut a prompt at `<image>`, tokenize the pieces each as a text of its own and put the picture between
them. A piece that starts with a line break then gets SentencePiece's leading space: `▁ <0x0A>`. In one text with
`<image>` as a token the same ids need a real space: `<image> \\n`. The template writes that, for picture parts as for
this project's `<|image|>` in strings.

The template has no `<s>`: the processor adds it, as it does to every text. (`tokenizer.apply_chat_template` with
`tokenize=True` would not; ask the processor.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer, LlavaProcessor
from transformers.utils import is_protobuf_available, is_sentencepiece_available, is_torchvision_available

from agevlm.conversion.sources import Source


if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor


IMAGE_TOKEN = "<image>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3


def load_tokenizer(source: Source) -> LlamaTokenizer:
    """The checkpoint's tokenizer with `<image>`, padding on the left with `<unk>` as the originals do.

    Raises:
        ValueError: no tokenizer, one that cannot be read, or no sentencepiece to read it with.
    """
    settings = source.configuration("tokenizer_config.json")
    fast, slow = (source.folder / name for name in ("tokenizer.json", "tokenizer.model"))
    if not fast.is_file():
        if not slow.is_file():
            raise ValueError(f"{source.name} holds neither tokenizer.model nor tokenizer.json.")
        if not (is_sentencepiece_available() and is_protobuf_available()):
            raise ValueError(
                f"{source.name} holds its tokenizer as SentencePiece only: `pip install sentencepiece protobuf` "
                "(or `pip install agevlm[baselines]`)."
            )
    # Defaults of the versions of transformers that these repositories were written for. Today's versions leave out
    # `<s>` without them. `legacy` decides whether a second turn starts with a space; single turns do not depend on it.
    defaults = {"legacy": True, "add_bos_token": True, "add_eos_token": False}
    stated = {name: value for name in defaults if (value := settings.get(name)) is not None}
    try:
        tokenizer = LlamaTokenizer.from_pretrained(source.folder, **{**defaults, **stated})
    except Exception as error:  # transformers tries one reader after another; each has errors of its own
        file = fast if fast.is_file() else slow
        raise ValueError(f"{file} cannot be read as a tokenizer ({error}). Download it again.") from error
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what is saved
    return tokenizer


def build_processor(
    tokenizer: LlamaTokenizer,
    image_size: int,
    cell_size: int,
    image_mean: Sequence[float] = CLIP_MEAN,
    image_std: Sequence[float] = CLIP_STD,
) -> LlavaProcessor:
    """The processor of both systems, with their template, `<image>` and bicubic resizing."""
    template = Path(__file__).with_name("chat_template_vicuna.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template
    pictures = {"resample": BICUBIC, "image_mean": list(image_mean), "image_std": list(image_std)}
    return llava_processor(tokenizer, image_size, cell_size, template, IMAGE_TOKEN, **pictures)


def llava_processor(
    tokenizer: Any, image_size: int, cell_size: int, template: str, image_token: str, **pictures: Any
) -> LlavaProcessor:
    """Pictures padded to a square in their mean color, then resized; one token per `cell_size` pixels.

    Args:
        pictures: `resample`, `image_mean`, `image_std`.
    """
    side = {"height": image_size, "width": image_size}
    image_processor = LlavaImageProcessor(do_pad=True, size={"shortest_edge": image_size}, crop_size=side, **pictures)
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=cell_size, vision_feature_select_strategy="full",
        num_additional_image_tokens=0, chat_template=template, image_token=image_token,
    )  # fmt: skip
