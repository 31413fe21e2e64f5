"""Code of others that a checkpoint's files name is neither in what is saved of it, nor in what is trained from it."""

import json
import shutil
from pathlib import Path

import pytest
from training_worker import make_rows, quick

from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.models import load
from agevlm.processing import AgeVlmProcessor
from agevlm.training import train
from agevlm.training.adapters import AdapterArguments
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage4_instruct
from builders import save_tiny, tiny_scenes
from vlms import llava


EVIL = "attacker/repo--evil.Model"
AUTO = ("AutoModel", "AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoVideoProcessor", "AutoProcessor")
CODE = ("auto_map", "custom_pipelines", "custom_generate")


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def hostile(folder: Path) -> Path:
    """Writes foreign code into every file of a checkpoint that may name some, and into the parts of each."""
    for file in ("config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json"):
        fields = json.loads((folder / file).read_text())
        parts = (fields.get(part) for part in ("text_config", "vision_config", "image_processor", "tokenizer"))
        for table in (fields, *filter(None, parts)):
            table["auto_map"] = {**table.get("auto_map", {}), **dict.fromkeys(AUTO, EVIL)}
            table["custom_pipelines"] = {"image-text-to-text": {"impl": EVIL, "pt": ["AutoModel"]}}
        if file == "tokenizer_config.json":
            fields["auto_map"]["AutoTokenizer"] = [EVIL, None]
        if file == "generation_config.json":
            fields["custom_generate"] = EVIL
        (folder / file).write_text(json.dumps(fields))
    return folder


def code_named(folder: Path) -> set[str]:
    """All code that the files of a folder name, also those of its checkpoints."""
    found = set()

    def walk(value: object, inside: bool = False) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, inside or name in CODE)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, inside)
        elif inside and value is not None:
            found.add(value)

    for path in folder.rglob("*.json"):
        walk(json.loads(path.read_text()))
    assert not any("attacker" in path.read_text() for path in folder.rglob("*.md"))
    return found


def auto_maps(folder: Path) -> list[dict | None]:
    files = ("config.json", "processor_config.json", "tokenizer_config.json")
    return [json.loads((folder / file).read_text()).get("auto_map") for file in files]


def test_it_is_not_saved_on(folder, tmp_path):
    own, maps = code_named(folder), auto_maps(folder)
    assert len(own) == 5 and all(name.split(".")[0].endswith("_agevlm") for name in own)
    assert EVIL in code_named(hostile(folder))
    for part in load(folder):
        part.save_pretrained(tmp_path / "saved")
    assert code_named(tmp_path / "saved") == own
    # Without `load`, the classes themselves forget Auto classes that are not theirs
    for part_class in (AgeVlmForConditionalGeneration, AgeVlmProcessor):
        part_class.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert auto_maps(tmp_path / "again") == maps


def test_it_is_not_saved_on_of_other_models(tmp_path):
    subject = llava()
    save_tiny(tmp_path / "model", subject.model, subject.processor)
    for part in load(hostile(tmp_path / "model")):
        part.save_pretrained(tmp_path / "saved")
    assert code_named(tmp_path / "saved") == set()


@pytest.mark.parametrize("flags", [{}, {"use_peft": True}], ids=["whole", "adapters"])
def test_it_does_not_pass_through_training(folder, tmp_path, flags):
    recipe = quick(stage4_instruct.recipe(size="tiny"), max_steps=2, save_steps=1)
    own = code_named(folder)
    out, adapters = tmp_path / "out", AdapterArguments(**flags)
    run_stage(recipe, out, data=make_rows("gt"), init_from=hostile(folder), adapters=adapters)
    assert code_named(out) == own and (out / "checkpoint-1").is_dir()


def test_it_does_not_pass_through_the_twin(folder, tmp_path):
    scenes = tiny_scenes(tmp_path / "scenes")
    start = hostile(folder)
    for stage in ("stage1_align", "stage4_instruct"):
        flags = ["--init_from", str(start), "--data", str(scenes), "--size", "tiny", "--max_steps", "1"]
        train.main([stage, "--variant", "twin", *flags, "--output_dir", str(tmp_path / stage)])
        assert code_named(tmp_path / stage) == set()
        start = Path(shutil.copytree(tmp_path / stage, tmp_path / f"hostile-{stage}"))
        hostile(start)
        # A folder that another run left behind is not continued, but started from.
        (start / "agevlm_stage.json").unlink()
