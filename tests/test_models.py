"""Loading models: every kind of damage is one sentence, however the model is loaded."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders_grounding import sam as save_sam
from hub_server import HubServer, connect
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from training_worker import make_rows, quick
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_serve_available

from agevlm import cli, models
from agevlm.analysis import cli as analyze
from agevlm.data.published import check
from agevlm.evaluation.cli import evaluate
from agevlm.evaluation.judge import Judge
from agevlm.grounding import cli as ground
from agevlm.grounding.models import Sam
from agevlm.models import CheckpointError, load, load_model, load_processor, weights_digest
from agevlm.serving import export, serve
from agevlm.serving.demo import cli as demo
from agevlm.training.adapters import AdapterArguments
from agevlm.training.cli import init
from agevlm.training.run_stage import run_stage
from agevlm.training.stages import stage1_align, stage4_instruct
from agevlm.training.train import main as train
from builders import picture, save_tiny, tiny_model, tiny_processor, tiny_scenes, tiny_tokenizer
from damages import (
    ALL,
    CONFIG,
    NAN,
    OF_CONFIG,
    OF_PROCESSOR,
    OF_WEIGHTS,
    PROCESSOR,
    TEMPLATE,
    WEIGHTS,
    change_weights,
    cut,
    filled,
    refuses,
    rewrite,
    set_field,
    without,
)
from vlms import llava, smolvlm


QUESTION = "Is there a red apple?"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    return save_tiny(folder)


@pytest.fixture
def folder(whole, tmp_path):
    """A checkpoint to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_whole_checkpoint_is_loaded(folder):
    model, processor = load(folder, ours=True)
    assert not model.training and processor.chat_template
    expected = tiny_model().state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("damage", ALL)
def test_a_damaged_checkpoint_is_one_sentence(folder, damage):
    change, message = ALL[damage]
    change(folder)
    start = time.process_time()
    refuses(lambda: load(folder), folder, message)
    assert time.process_time() - start < 10


def test_a_damaged_shard_is_named(tmp_path):
    for part, settings in ((tiny_model(), {"max_shard_size": "100KB"}), (tiny_processor(), {})):
        part.save_pretrained(tmp_path, **settings)
    load(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    cut(shard.name, 1000)(tmp_path)
    refuses(lambda: load(tmp_path), tmp_path, rf"{shard.name} cannot be used \(SafetensorError")
    shard.unlink()
    refuses(lambda: load(tmp_path), tmp_path, rf"{shard.name} cannot be used \(FileNotFoundError")
    rewrite("model.safetensors.index.json", "{")(tmp_path)
    refuses(lambda: load(tmp_path), tmp_path, r"model\.safetensors\.index\.json cannot be used")


def test_a_repository_is_looked_at_before_it_is_built(whole, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    damages = {"missing": ALL["missing tensors"], "deep": ALL["100,000 layers"], "plain": (lambda folder: None, "")}
    with HubServer(tmp_path / "hub") as hub:
        connect(hub, monkeypatch)
        for name, (change, message) in damages.items():
            place = Path(shutil.copytree(whole, tmp_path / name))
            change(place)
            hub.add_repo(f"org/{name}", place)
            if message:
                refuses(lambda name=name: load(f"org/{name}"), Path(f"org/{name}"), message)
        assert load("org/plain", ours=True)[0].num_parameters() == tiny_model().num_parameters()
        refuses(lambda: load("org/none"), Path("org/none"), "cannot be loaded: .* not a valid model identifier")


# ---- Ways of loading: name -> what calls it with a checkpoint, scenes and an empty folder ----


def look(verb: Callable) -> Callable:
    return lambda folder, scenes, out: verb([str(folder), str(scenes), "--output", str(out), "--limit", "2"])


def ask(folder: Path, scenes: Path, out: Path) -> None:
    picture().save(out.parent / "picture.png")
    analyze.attention([str(folder), str(out.parent / "picture.png"), QUESTION, "--output", str(out)])


def start_stage(**flags) -> Callable:
    def way(folder: Path, scenes: Path, out: Path) -> None:
        recipe = (stage4_instruct if flags else stage1_align).recipe(size="tiny").override(max_steps=1)
        run_stage(recipe, out, data=make_rows("gt"), init_from=folder, adapters=AdapterArguments(**flags))

    return way


def start_train(*more: str) -> Callable:
    def way(folder: Path, scenes: Path, out: Path) -> None:
        places = ["--init_from", str(folder), "--data", str(scenes), "--output_dir", str(out)]
        train(["stage1_align", "--size", "tiny", *places, *more])

    return way


WAYS = {
    "eval": lambda folder, scenes, out: evaluate([str(folder), "--scenes", str(scenes), "--output", str(out)]),
    "analyze attention": ask,
    "analyze similarity": look(analyze.similarity),
    "analyze padding": look(analyze.padding),
    "demo": lambda folder, scenes, out: demo.main([str(folder)]),
    "export": lambda folder, scenes, out: export.main([str(folder), str(out)]),
    "train": start_stage(),
    "train with adapters": start_stage(use_peft=True),
    "twin": start_train("--variant", "twin"),
}
# One of each kind, which only `agevlm.models` refuses in a sentence: of the weights, the configuration, the processor
SOME = {name: ALL[name] for name in ("weights cut off", "100,000 layers", "std of zeros")}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    return tiny_scenes(folder)


@pytest.mark.parametrize("damage", SOME)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_refuses_it(folder, scenes, tmp_path, way, damage):
    change, message = SOME[damage]
    change(folder)
    refuses(lambda: WAYS[way](folder, scenes, tmp_path / "out"), folder, message)
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.skipif(not is_serve_available(), reason="the packages of `pip install 'agevlm[serve]'` are missing")
@pytest.mark.parametrize("damage", SOME)
def test_the_server_refuses_it(folder, damage, monkeypatch):
    from fastapi import FastAPI
    from transformers.cli.serving import server

    managers = []
    monkeypatch.setattr(server, "build_server", lambda manager, *_, **__: managers.append(manager) or FastAPI())
    serve.build_app(str(folder))
    (manager,) = managers
    change, message = SOME[damage]
    change(folder)

    def both():
        manager._load_processor(f"{folder}@main")
        manager._load_model(f"{folder}@main")

    refuses(both, folder, message)


def test_a_dry_run_refuses_a_configuration_without_building_it(folder, scenes, tmp_path):
    change, message = OF_CONFIG["100,000 layers"]
    dry_run = start_train("--dry_run")
    change(folder)
    refuses(lambda: dry_run(folder, scenes, tmp_path / "out"), folder, message)
    (folder / CONFIG).write_text("{")
    refuses(lambda: dry_run(folder, scenes, tmp_path / "out"), folder, "JSONDecodeError")


def test_a_processor_alone_is_looked_at(folder):
    (folder / CONFIG).unlink()
    load_processor(folder, ours=True)
    change, message = OF_PROCESSOR["std of zeros"]
    change(folder)
    refuses(lambda: ground._grid(str(folder)), folder, message)


def test_data_check_counts_with_whole_tokenizers(folder):
    assert check._tokenizer(folder).chat_template
    rewrite(TEMPLATE, "{% for")(folder)
    refuses(lambda: check._tokenizer(folder), folder, "TemplateSyntaxError")
    cut("tokenizer.json", 1000)(folder)
    refuses(lambda: check._tokenizer(folder), folder, r"tokenizer\.json")


def test_the_command_line_prints_it(folder, tmp_path, capsys, monkeypatch):
    cut(WEIGHTS, 1000)(folder)
    monkeypatch.setattr("sys.argv", ["agevlm", "export", str(folder), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2
    assert said.startswith(f"agevlm: {folder}: model.safetensors cannot be used") and "\n" not in said


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path):
    subject = llava()
    save_tiny(tmp_path / "llava", subject.model, subject.processor)
    for way in (load, load_model):
        with pytest.raises(CheckpointError, match="llava is no AGE-VLM checkpoint: its model type is 'llava'"):
            way(tmp_path / "llava", ours=True)
    with pytest.raises(CheckpointError, match="llava is no AGE-VLM checkpoint"):
        export.main([str(tmp_path / "llava"), str(tmp_path / "out")])
    for name in ("a/b/c", str(tmp_path / "missing")):
        with pytest.raises(CheckpointError, match=f"{name} is neither a folder nor the id of a repository"):
            load(name)


# ---- Other models ----


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "model"
    subject = smolvlm()
    save_tiny(folder, subject.model, subject.processor)
    return folder


def first_of(weights: dict[str, torch.Tensor], pattern: str) -> str:
    return next(name for name in weights if pattern in name)


def again(pattern: str, other: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """All tensors of one layer, a second time under another index."""
    return lambda weights: (
        weights | {name.replace(pattern, other): tensor.clone() for name, tensor in weights.items() if pattern in name}
    )


OF_OTHERS = {
    "weights cut off": OF_WEIGHTS["weights cut off"],
    "missing tensors": (without("vision_model"), r"\d+ missing \(model\.vision_model"),
    "misshapen tensor": (
        change_weights(lambda w: w | {first_of(w, "connector"): torch.ones(3)}),
        r"1 of another shape \(model\.connector.* with \(3,\) in the file and \(32, 64\) in the model",
    ),
    "NaN": (change_weights(lambda w: filled(first_of(w, "connector"), NAN)(w)), r"1 not finite \(model\.connector"),
    "more layers": (
        change_weights(again("text_model.layers.1.", "text_model.layers.2.")),
        r"9 unexpected \(model\.text_model\.layers\.2",
    ),
    "100,000 layers": (
        set_field(CONFIG, "text_config", "num_hidden_layers", value=100_000),
        "num_hidden_layers = 100000",
    ),
    "empty config": OF_CONFIG["empty config"],
    "std of zeros": (set_field(PROCESSOR, "image_processor", "image_std", value=[0, 0, 0]), "image_std"),
    "template that does not parse": OF_PROCESSOR["template that does not parse"],
    "no template": OF_PROCESSOR["no template"],
}


@pytest.mark.parametrize("damage", OF_OTHERS)
def test_other_models_are_looked_at_likewise(foreign, tmp_path, damage):
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    change, message = OF_OTHERS[damage]
    change(folder)
    refuses(lambda: load(folder), folder, message)
    recipe = stage1_align.recipe(size="tiny", variant="twin")
    refuses(lambda: run_stage(recipe, tmp_path / "out", data=make_rows("ii"), init_from=folder), folder, message)


def test_published_models_may_hold_what_transformers_leaves_out(foreign, tmp_path):
    """A head for another task, as many published files have; unlike layers that the configuration leaves out."""
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    change_weights(lambda w: w | {"value_head.weight": torch.ones(3)})(folder)
    model, _ = load(folder)
    assert "value_head.weight" not in model.state_dict()


def test_code_of_others_is_run_on_request_alone(folder):
    set_field(CONFIG, "model_type", value="unheard")(folder)
    with pytest.raises(CheckpointError, match=r"needs code of its own: .*'unheard'.*--trust-remote-code"):
        load(folder)


def test_a_judge_is_looked_at(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "judge")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "judge")
    Judge(str(tmp_path / "judge"), tmp_path / "cache")
    without("layers.1")(tmp_path / "judge")
    refuses(
        lambda: Judge(str(tmp_path / "judge"), tmp_path / "cache"), tmp_path / "judge", r"9 missing \(model\.layers\.1"
    )


def test_grounding_backends_are_looked_at(tmp_path):
    save_sam(tmp_path / "sam")
    Sam(str(tmp_path / "sam"))
    without("mask_decoder")(tmp_path / "sam")
    refuses(lambda: Sam(str(tmp_path / "sam")), tmp_path / "sam", r"missing \(mask_decoder")


def test_parts_are_looked_at(tmp_path):
    source = Path(__file__).parents[1] / "checkpoints" / "tiny-parts"
    folder = Path(shutil.copytree(source, tmp_path / "parts"))
    start = [str(tmp_path / "out"), "--parts", str(folder)]
    init([*start, "--dry-run"])
    tower = folder / "vision_tower"
    name = "embeddings.layernorm.bias"
    change_weights(filled(name, NAN))(tower)
    refuses(lambda: init(start), tower, rf"1 not finite \({name}\)")
    change_weights(lambda w: w | {"extra": torch.ones(1)})(tower)
    with pytest.raises(ValueError, match=r"not a plain ConvNeXt. unexpected: extra"):
        init(start)
    rewrite(TEMPLATE, "{% for")(folder)
    refuses(lambda: init(start), folder, "TemplateSyntaxError")


# ---- Adapters, 4 bits ----


@pytest.fixture
def adapter(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted


def test_an_adapter_is_laid_over_the_model(folder, adapter):
    place, adapted = adapter
    plain, processor = load(folder)
    model, _ = load(folder, adapter=str(place))
    assert weights_digest(model) != weights_digest(plain)
    inputs = processor(text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        found, expected = model(**inputs).logits, adapted(**inputs).logits
        assert not torch.allclose(found, plain(**inputs).logits)
    torch.testing.assert_close(found, expected)
    assert type(model) is type(plain), "its maps stay where grounding looks for them"


OF_ADAPTERS = {
    "missing": (lambda w: {name: tensor for name, tensor in w.items() if "layers.3." not in name}, r"2 missing \("),
    "unexpected": (lambda w: w | {"base_model.model.extra.lora_A.weight": torch.ones(2)}, r"1 unexpected \("),
    "NaN": (lambda w: filled(next(iter(w)), NAN)(w), r"1 not finite \("),
}


@pytest.mark.parametrize("damage", OF_ADAPTERS)
def test_a_damaged_adapter_is_refused(folder, adapter, damage):
    change, message = OF_ADAPTERS[damage]
    file = adapter[0] / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    refuses(lambda: load(folder, adapter=str(adapter[0])), adapter[0], message)


def test_four_bits_need_their_library(folder, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"4-bit loading needs bitsandbytes.*pip install bitsandbytes"):
        load(folder, four_bit=True)


def test_a_resumed_run_looks_at_its_checkpoint(folder, tmp_path):
    recipe = quick(stage1_align.recipe(size="tiny"), max_steps=2, save_steps=1)
    out, rows = tmp_path / "out", make_rows("gt")
    run_stage(recipe, out, data=rows, init_from=folder)
    # As if it had been killed behind its first checkpoint
    shutil.copytree(out / "checkpoint-1", tmp_path / "killed" / "checkpoint-1")
    shutil.copy(out / "checkpoint-1" / "agevlm_stage.json", tmp_path / "killed")
    without("vision_tower")(tmp_path / "killed" / "checkpoint-1")
    refuses(
        lambda: run_stage(recipe, tmp_path / "killed", data=rows, init_from=folder),
        tmp_path / "killed" / "checkpoint-1",
        r"\d+ tensors are missing, 0 are unexpected, first model\.vision_tower",
    )
