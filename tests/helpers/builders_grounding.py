"""Tiny random-weight folders of the real grounding classes (Florence-2, Grounding DINO, SAM, SAM 2, SAM 3), as
`save_pretrained` leaves them, with tokenizers trained on the spot. Nothing in them is replaced; where random weights
would never say anything, the folder's own generation configuration leaves only words that mean something to try."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BertConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2Processor,
    Sam2VisionConfig,
    Sam3Config,
    Sam3Model,
    Sam3Processor,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    SwinConfig,
)

from builders import train_tokenizer


WORDS = ["a red apple on the left of a blue car", "is there a green tree in the image? yes no", "locate the phrases"]
SIDE = 64
LOCATIONS = [f"<loc_{number}>" for number in range(1000)]
MARKS = ["<sep>", "<poly>", "</poly>"]
TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# Sizes of every SAM
ATTENTION = {"num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32}
MASK_DECODER = {"hidden_size": 32, "iou_head_hidden_dim": 32, **ATTENTION}
PROMPTS = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16}
SQUARE, QUARTER = ({"height": side, "width": side} for side in (SIDE, SIDE // 4))


def _byte_tokenizer(special: list[str], **names) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(WORDS, special), **names)


def florence2(folder: Path, answers: list[str] = LOCATIONS, positions: int = 200) -> Path:
    """Florence-2 whose beams may say `answers` alone: without that, random weights hardly ever name a place."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>", *LOCATIONS, *MARKS]
    tokenizer = _byte_tokenizer(
        special, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_seq_length=(SIDE // 32) ** 2 + 1
    )
    tasks = ("pure_text", "polygons", "phrase_grounding")
    processor = Florence2Processor(image_processor, tokenizer, post_processor_config={task: {} for task in tasks})
    torch.manual_seed(0)
    text = BartConfig(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=positions, init_std=0.5, forced_eos_token_id=2,
        **{f"{part}_{name}": value for part in ("encoder", "decoder")
           for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}, **TOKENS,
    )  # fmt: skip
    vision = {
        "depths": [1, 1, 1, 1], "embed_dim": [8, 8, 8, 16], "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2],
        "window_size": 4, "projection_dim": 32,
    }  # fmt: skip
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=tokenizer.image_token_id)
    model = Florence2ForConditionalGeneration(config)
    allowed = set(tokenizer.convert_tokens_to_ids([*answers, "</s>"]))
    model.generation_config.suppress_tokens = [token for token in range(len(tokenizer)) if token not in allowed]
    model.generation_config.update(**TOKENS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def grounding_dino(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The ids that Grounding DINO takes for special: BERT's [CLS], [SEP], "." and "?".
    fillers = [f"[unused{number}]" for number in range(1030)]
    words = sorted({word for text in WORDS for word in text.replace("?", " ").split()})
    names = ["[PAD]", "[UNK]", *fillers]
    names[101], names[102], names[1012], names[1029] = "[CLS]", "[SEP]", ".", "?"
    tokenizer.model = models.WordLevel({name: place for place, name in enumerate([*names, *words])}, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=SIDE, window_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=len(fast), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, num_queries=8, num_feature_levels=4, max_text_len=32,
        d_model=64,  # in 32 groups that are normalised
        encoder_layers=1, decoder_layers=2,  # with one, transformers finds nothing to tie
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=SQUARE), fast).save_pretrained(folder)
    return folder


def sam(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {
        **PROMPTS, **ATTENTION, "output_channels": 32, "window_size": 2, "global_attn_indexes": [0],
        "num_pos_feats": 16,
    }  # fmt: skip
    config = SamConfig(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=MASK_DECODER)
    SamModel(config).save_pretrained(folder)
    image_processor = SamImageProcessorPil(
        size={"longest_edge": SIDE}, pad_size=SQUARE, mask_size={"longest_edge": SIDE // 4}, mask_pad_size=QUARTER
    )
    SamProcessor(image_processor).save_pretrained(folder)
    return folder


def sam2(folder: Path) -> Path:
    """Needs torchvision."""
    from transformers import Sam2ImageProcessor

    torch.manual_seed(0)
    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 2, 2, 2], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    config = Sam2Config(
        vision_config=vision.to_dict(), prompt_encoder_config=PROMPTS, mask_decoder_config=MASK_DECODER
    )
    Sam2Model(config).save_pretrained(folder)
    image_processor = Sam2ImageProcessor(size=SQUARE, mask_size=QUARTER)
    Sam2Processor(image_processor).save_pretrained(folder)
    return folder


def sam3(folder: Path) -> Path:
    """Needs torchvision."""
    from transformers import Sam3ImageProcessor

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = _byte_tokenizer([start, end], bos_token=start, eos_token=end, pad_token=end)
    torch.manual_seed(0)
    side, small = 56, {"hidden_size": 32, "num_attention_heads": 2}
    layer, one = {**small, "intermediate_size": 32}, {"num_layers": 1}
    backbone = {
        **layer, "model_type": "sam3_vit_model", "num_hidden_layers": 2, "image_size": side,
        "pretrain_image_size": side, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1],
    }  # fmt: skip
    text = CLIPTextConfig(
        **layer, vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=32, projection_dim=32,
        eos_token_id=1,
    )  # fmt: skip
    config = Sam3Config(
        vision_config={
            "fpn_hidden_size": 32, "backbone_config": backbone, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=text.to_dict(), geometry_encoder_config={**layer, **one}, detr_encoder_config={**layer, **one},
        detr_decoder_config={**layer, **one, "num_queries": 5}, mask_decoder_config=small,
    )  # fmt: skip
    Sam3Model(config).save_pretrained(folder)
    Sam3Processor(Sam3ImageProcessor(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)
    return folder


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Random RGB pictures of odd sizes, wide and tall."""
    generator = np.random.default_rng(seed)
    sizes = [(61, 47), (33, 90), (64, 64), (120, 31)]
    return [
        Image.fromarray(generator.integers(0, 256, (*sizes[index % len(sizes)][::-1], 3), dtype=np.uint8))
        for index in range(count)
    ]
