"""Checkpoint folders in the hands of users: complete, free of pickles, and loadable without this repository."""

from pathlib import Path

import pytest
from remote_code_worker import load_without_the_repository
from transformers.utils import is_torchvision_available

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmImageProcessorPil, AgeVlmProcessor
from builders import picture, tiny_model, tiny_processor


ROOT = Path(__file__).resolve().parent.parent
CODE = {
    **dict.fromkeys(
        [
            f"{name}_agevlm.py"
            for name in ("compatibility", "configuration", "modeling", "guidance", "cross_attention")
        ],
        ROOT / "modeling_agevlm",
    ),
    **dict.fromkeys(["image_processing_agevlm.py", "processing_agevlm.py"], ROOT / "processing"),
}
FILES = {
    *CODE,
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
# As in transformers' own tests of the Pillow backend.
HIDE_TORCHVISION = """
import runpy, sys
sys.modules["torchvision"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PICKLES = {".bin", ".pickle", ".pkl", ".pt", ".pth"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_folder_is_complete_and_the_order_of_saving_does_not_matter(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    for name, parts in (("model first", (model, processor)), ("processor first", (processor, model))):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    saved = contents(tmp_path / "model first")
    assert saved == contents(tmp_path / "processor first")
    assert saved.keys() == FILES
    for name, source in CODE.items():
        assert saved[name] == (source / name).read_bytes(), name


def check(folder: Path, tmp_path: Path, hide_torchvision: bool = False) -> None:
    """A user's process loads, asks, prints no warning, and saves the same again."""
    model = AgeVlmForConditionalGeneration.from_pretrained(folder)
    processor = AgeVlmProcessor.from_pretrained(folder)
    if hide_torchvision:
        processor.image_processor = AgeVlmImageProcessorPil.from_pretrained(folder)
    start = ("-c", HIDE_TORCHVISION) if hide_torchvision else ()
    result = load_without_the_repository(folder, model, processor, picture(50, 90), tmp_path, start=start)
    assert result.stderr == ""
    before, after = contents(folder), contents(tmp_path / "resaved")
    assert after.keys() == FILES
    for name in (*CODE, "model.safetensors", "processor_config.json", "chat_template.jinja"):
        assert after[name] == before[name], name


@pytest.mark.parametrize(
    "hide_torchvision",
    [False, pytest.param(True, marks=pytest.mark.skipif(not is_torchvision_available(), reason="is not installed"))],
)
def test_the_shipped_checkpoint_loads_without_the_repository(tmp_path, hide_torchvision):
    """`test_hub_roundtrip.py` does the same with a folder that was just saved."""
    shipped = ROOT / "checkpoints" / "agevlm-tiny"
    present = contents(shipped)
    assert present.keys() >= FILES
    assert not {Path(name).suffix for name in present} & PICKLES
    check(shipped, tmp_path, hide_torchvision)
