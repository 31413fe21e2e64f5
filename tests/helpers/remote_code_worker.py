"""What a user of a checkpoint folder does, who has transformers and nothing of this repository.

A script for an isolated process: `python -I remote_code_worker.py CHECKPOINT PICTURE EXPECTED RESAVED`. EXPECTED is a
safetensors file with what the installed package made of the same question; RESAVED a folder to write.
"""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)
from transformers.utils import is_torchvision_available, logging


QUESTION = "Is there a red apple in the image?"


class NoRepository(MetaPathFinder):
    """Hides the editable installation."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("agevlm", "builders"):
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)


def conversation(picture: str) -> list[dict]:
    content = [{"type": "image", "path": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def check_folder(folder: str, picture: str, expected: dict[str, torch.Tensor], auto_class=AutoModelForImageTextToText):
    """Loads everything from `folder`, asks about `picture`, compares with `expected`; returns model and processor."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    for loaded in (model, processor, processor.image_processor):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    inputs = processor.apply_chat_template(
        conversation(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for name, value in inputs.items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.allclose(logits, expected["logits"], atol=1e-6, rtol=0), (logits - expected["logits"]).abs().max()
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(ids, expected["generated"])
    assert isinstance(processor.decode(ids[0], skip_special_tokens=True), str)
    return model, processor


def main(folder: str, picture: str, expected_file: str, resaved: str) -> None:
    sys.meta_path.insert(0, NoRepository())
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    expected = load_file(expected_file)

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "agevlm"
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert image_processor.backend == ("torchvision" if is_torchvision_available() else "pil")
    pixels = image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected["pixel_values"][0])
    check_folder(folder, picture, expected, AutoModel)
    model, processor = check_folder(folder, picture, expected)

    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    answer = ask(text=conversation(picture), generate_kwargs={"max_new_tokens": 8, "do_sample": False})
    turns = answer[0]["generated_text"]
    prompt_length = expected["input_ids"].shape[1]
    wanted = processor.decode(expected["generated"][0, prompt_length:], skip_special_tokens=True)
    assert turns[-1]["role"] == "assistant" and turns[-1]["content"] == wanted, (turns, wanted)

    model.save_pretrained(resaved)
    processor.save_pretrained(resaved)
    check_folder(resaved, picture, expected)
    alone = Path(resaved) / "image_processor"
    image_processor.save_pretrained(alone)
    again = AutoImageProcessor.from_pretrained(alone, trust_remote_code=True)
    assert torch.equal(again(Image.open(picture), return_tensors="pt")["pixel_values"], pixels)

    assert not [name for name in sys.modules if name.split(".")[0] == "agevlm"]
    try:
        import agevlm  # noqa: F401
    except ModuleNotFoundError:
        print("ok")
    else:
        raise AssertionError("agevlm can be imported: this process proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
