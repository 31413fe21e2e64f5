"""What a user of a checkpoint folder does, who has transformers and nothing of this repository.

Tests call `load_without_the_repository`, which runs this file in an isolated process: CHECKPOINT PICTURE EXPECTED
RESAVED. CHECKPOINT is one of AGE-VLM or a converted baseline, EXPECTED what the installed package makes of the same
question, RESAVED a folder to write.
"""

import os
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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


def answer(model, processor, picture: str) -> dict[str, torch.Tensor]:
    """The question's inputs, the `logits` of one pass, and the tokens of question and answer as `generated`."""
    inputs = processor.apply_chat_template(
        conversation(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return {**inputs, "logits": logits, "generated": generated}


def isolated(home: Path, *command: object, **environment: str) -> subprocess.CompletedProcess:
    """Python with `command`, in a process that has nothing of this one, works offline and keeps caches in `home`."""
    known = {
        "PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env={**known, **environment}, capture_output=True, text=True, timeout=280)


def load_without_the_repository(
    checkpoint: Path | str, model, processor, picture: Image.Image, home: Path, *, start=(), **environment: str
) -> subprocess.CompletedProcess:
    """Runs this file on a checkpoint that `model` and `processor` are of; it saves all again to `home`/resaved."""
    picture.save(home / "picture.png")
    save_file(answer(model, processor, str(home / "picture.png")), home / "expected.safetensors")
    files = [home / name for name in ("picture.png", "expected.safetensors", "resaved")]
    result = isolated(home, "-I", *start, __file__, checkpoint, *files, **environment)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
    return result


def check_folder(folder: str, picture: str, expected: dict[str, torch.Tensor], auto_class=AutoModelForImageTextToText):
    """Loads everything from `folder`, asks about `picture`, compares with `expected`; returns model and processor."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    for name, value in answer(model, processor, picture).items():
        assert torch.allclose(value, expected[name], atol=1e-6 if name == "logits" else 0, rtol=0), name
    assert isinstance(processor.decode(expected["generated"][0], skip_special_tokens=True), str)
    return model, processor


def check_own_classes(folder: str, picture: str, expected: dict[str, torch.Tensor], resaved: str) -> None:
    """What only checkpoints of AGE-VLM offer: code for each Auto class, and a pipeline."""
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert image_processor.backend == ("torchvision" if is_torchvision_available() else "pil")
    pixels = image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected["pixel_values"][0])
    alone = Path(resaved) / "image_processor"
    image_processor.save_pretrained(alone)
    again = AutoImageProcessor.from_pretrained(alone, trust_remote_code=True)
    assert torch.equal(again(Image.open(picture), return_tensors="pt")["pixel_values"], pixels)

    whole, _ = check_folder(folder, picture, expected)
    model, processor = check_folder(folder, picture, expected, AutoModel)
    for loaded in (whole, model, processor, processor.image_processor, image_processor):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    chat = ask(text=conversation(picture), generate_kwargs={"max_new_tokens": 8, "do_sample": False})
    turn = chat[0]["generated_text"][-1]
    said = processor.decode(expected["generated"][0, expected["input_ids"].shape[1] :], skip_special_tokens=True)
    assert (turn["role"], turn["content"]) == ("assistant", said), (turn, said)


def main(folder: str, picture: str, expected_file: str, resaved: str) -> None:
    sys.meta_path.insert(0, NoRepository())
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    expected = load_file(expected_file)
    for part in check_folder(folder, picture, expected):
        part.save_pretrained(resaved)
    check_folder(resaved, picture, expected)
    if AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "agevlm":
        check_own_classes(folder, picture, expected, resaved)

    assert not [name for name in sys.modules if name.split(".")[0] == "agevlm"]
    try:
        import agevlm  # noqa: F401
    except ModuleNotFoundError:
        print("ok")
    else:
        raise AssertionError("agevlm can be imported: this process proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
