"""What a user of a converted baseline does, who has transformers and nothing of this repository.

A script for an isolated process: `python -I baselines_worker.py CHECKPOINT PICTURE QUESTION EXPECTED RESAVED`.
EXPECTED is a safetensors file with `input_ids`, `logits` and `generated` of the same question; RESAVED a folder to
write.
"""

import sys
from importlib.abc import MetaPathFinder

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging


class NoRepository(MetaPathFinder):
    """Hides the editable installation."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in ("agevlm", "builders"):
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)


def check(folder: str, picture: str, question: str, expected: dict[str, torch.Tensor]):
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.allclose(logits, expected["logits"], atol=1e-6, rtol=0), (logits - expected["logits"]).abs().max()
    ids = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(ids, expected["generated"]), (ids, expected["generated"])
    return model, processor


def main(folder: str, picture: str, question: str, expected_file: str, resaved: str) -> None:
    sys.meta_path.insert(0, NoRepository())
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    expected = load_file(expected_file)
    for part in check(folder, picture, question, expected):
        part.save_pretrained(resaved)
    check(resaved, picture, question, expected)
    assert not [name for name in sys.modules if name.split(".")[0] == "agevlm"]
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
