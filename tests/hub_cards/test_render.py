"""Cards say what the files of a folder say, in what the Hub reads, and nothing of the machine that made them."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from agevlm.hub_cards.cli import main
from agevlm.hub_cards.facts import count_parameters, read_facts, weights_fingerprint
from agevlm.hub_cards.render import render_card, write_card
from agevlm.training.publish import published_files
from builders import picture, save_tiny, tiny_model


FACTS = {
    "name": "stage3_ground",
    "stage": 3,
    "variant": "agevlm-lm",
    "size": "tiny",
    "repo": "someone/agevlm",
    "parent": {"init_from": "someone/stage2", "revision": "abc123", "repo": "someone/stage2"},
    "base_models": ["meta-llama/Llama-3.2-1B-Instruct", "timm/convnext"],
    "data": {"rows": 1000, "guided_rows": 31, "fingerprint": "f00d", "masks_of": "phrases"},
    "recipe": {"trains": ["projector"], "training": {"learning_rate": 1e-5, "max_steps": -1, "seed": 7}},
    "recipe_hash": "beef",
    "git_commit": None,
    "versions": {"torch": "2.13"},
    "metrics": {"loss": 1.23456, "guidance_loss": 0.5, "num_tokens": 1200},
}
EVALUATION = {
    "split": "composition",
    "benchmarks": {
        "pope": {
            "headline": "f1",
            "n": 600,
            "f1": 61.25,
            "yes_ratio": 9.0,
            "unparsed": 0.5,
            "protocol": "strict yes/no",
            "constants": {"always yes": {"f1": 66.7}, "always no": {"f1": 0.0}},
        }
    },
    "grounding": {"n": 10, "in_mask_mass": {"mean": 0.51}, "uniform": {"in_mask_mass": 0.1}},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished stage as it lies on the disk."""
    folder = tmp_path / "stage3"
    save_tiny(folder)
    (folder / "agevlm_stage.json").write_text(json.dumps(FACTS))
    log = [
        {"step": step, "loss": 2 / step, "guidance_loss": 1 / step, "in_mask_mass": 0.1 * step} for step in (1, 2, 3)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def check_well_formed(folder: Path) -> str:
    """The metadata parses, nothing is unfilled, every picture is there, and the code is Python; returns the text."""
    card = ModelCard.load(folder / "README.md")
    assert isinstance(yaml.safe_load(card.data.to_yaml()), dict)
    assert "{{" not in card.content and "{%" not in card.content and "None" not in card.content
    for link in re.findall(r"\]\(([^)]+)\)", card.text):
        assert link.startswith("https://") or (folder / link).is_file(), link
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)
    return card.text


# ---- Metadata ----


def test_metadata_is_what_the_hub_reads():
    data = render_card(FACTS).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert (data.base_model, data["base_model_relation"]) == ("someone/stage2", "finetune")
    assert {"agevlm", "custom_code", "stage-3"} <= set(data.tags)
    assert "| masks of | phrases |" in render_card(FACTS).content


def test_a_stage_in_the_repository_of_its_parent_names_the_published_parts():
    facts = {**FACTS, "repo": "someone/stage2"}
    data = render_card(facts).data
    assert data.base_model == FACTS["base_models"]
    assert data.license == "llama3.2"  # which models made from it must carry
    assert "| started from | someone/stage2 |" in render_card(facts).content
    assert render_card({**FACTS, "base_models": []}).data.license is None


def test_a_local_parent_is_named_without_its_place_and_no_base_model():
    for place in ("/home/me/secret/runs/stage2", "runs/stage2", "stage2"):
        parent = {"init_from": place, "revision": None, "repo": None}
        card = render_card({**FACTS, "parent": parent, "base_models": []})
        assert card.data.base_model is None
        assert "| started from | stage2 |" in card.content
        assert "revision of it" not in card.content
        assert "secret" not in card.content and "runs/" not in card.content


# ---- Text ----


def test_an_intermediate_stage_says_so_before_anything_else():
    lines = [line for line in render_card(FACTS).text.splitlines() if line]
    assert lines[0].startswith("> **Intermediate checkpoint** of stage 3 of 4 (stage3_ground), not for use")
    assert "https://huggingface.co/someone/agevlm" in lines[0]
    assert lines[1].startswith("# AGE-VLM (agevlm-lm")
    assert "Intermediate" not in render_card({**FACTS, "stage": 4}).text


def test_facts_and_metrics_appear_and_missing_ones_do_not():
    text = render_card(FACTS).text
    for line in (
        "| rows | 1,000 |",
        "| rows with a mask | 31 |",
        "| revision of it | abc123 |",
        "| recipe hash | beef |",
        "| learning_rate | 1e-05 |",
        "| seed | 7 |",
        "| **3, this one** | `stage3-ground` |",
        "| loss | 1.235 |",
        "| num_tokens | 1200 |",
        'repo = "someone/agevlm"',
        "Libraries: torch 2.13.",
        "--init_from someone/stage2 --revision abc123",
    ):
        assert line in text, line
    for absent in ("at commit", "max_steps", "## Evaluation", "None", "More Information Needed"):
        assert absent not in text


def test_a_card_without_facts_is_still_a_card(tmp_path):
    path = write_card(tmp_path / "new")
    assert path.read_text().startswith("---\nlanguage: en")
    assert [item.name for item in path.parent.iterdir()] == ["README.md"]
    check_well_formed(tmp_path / "new")


def test_a_folder_gets_its_loss_curve_its_size_and_the_code_it_runs(folder):
    before = {path.name for path in folder.iterdir()}
    text = check_well_formed(write_card(folder).parent)
    assert {path.name for path in folder.iterdir()} - before == {"README.md", "loss.png"}
    assert "![Loss over steps](loss.png)" in text
    assert Image.open(folder / "loss.png").size[0] > 1000  # two panels: the losses, and where it looks
    for name in folder.glob("*.py"):
        assert f"`{name.name}`" in text
    parameters = count_parameters(folder)
    assert sum(parameters.values()) == tiny_model().num_parameters() and "other" not in parameters
    assert f"| parameters of the vision tower | {parameters['vision tower']:,} |" in text
    assert "| pictures | 96 x 96 pixels |" in text
    assert "do not rely on its answers" in text
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_card(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_published_card_pins_its_tag(folder):
    push = {"repo": "org/m", "tag": "stage3-ground", "status": "pushed", "commit": "c0ffee"}
    (folder / "agevlm_push.json").write_text(json.dumps(push))
    text = check_well_formed(write_card(folder).parent)
    assert (
        'repo = "org/m"' in text and 'from_pretrained(repo, revision="stage3-ground", trust_remote_code=True)' in text
    )


@pytest.mark.parametrize("facts", [{}, {"data": FACTS["data"]}, {**FACTS, "repo": None}])
def test_the_quick_start_runs_where_the_card_lies_and_fits_any_data(folder, facts, monkeypatch, capsys):
    """Before a push; it asks about nothing that the training data happened to show."""
    (folder / "agevlm_stage.json").write_text(json.dumps(facts))
    text = check_well_formed(write_card(folder).parent)
    assert "apple" not in text and 'repo = "."  # the folder of this file\n' in text
    picture().save(folder / "picture.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (folder.parent / "quick_start.py").write_text(code)
    monkeypatch.chdir(folder)
    runpy.run_path(str(folder.parent / "quick_start.py"))
    assert capsys.readouterr().out.endswith("\n")


# ---- agevlm card ----


def test_results_and_attention_are_copied_shown_and_written_as_the_hub_reads_them(folder, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(EVALUATION))
    Image.new("RGB", (8, 8)).save(tmp_path / "apple.png")
    flags = ["--evaluation", str(tmp_path / "metrics.json"), "--attention", str(tmp_path / "apple.png")]
    main([str(folder), *flags])
    text = check_well_formed(folder)
    assert "| pope | 600 | f1 | 61.25 | 66.7 (always yes) | 9 | 0.5 |" in text
    assert "| in mask mass | 0.51 | 0.1 |" in text and "- pope: strict yes/no" in text
    assert "![Where the cross-attention looks](attention.png)" in text
    assert not (folder / ".eval_results").exists()

    main([str(folder), *flags[:2], "--dataset", "org/scenes"])
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "pope.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/scenes", "composition/pope", 61.25)
    assert entry.notes == "f1; strict yes/no"

    (tmp_path / "metrics.json").write_text(json.dumps({**EVALUATION, "benchmarks": {}}))
    main([str(folder), *flags[:2]])  # of another checkpoint, say: nothing of the old one stays
    assert not (folder / ".eval_results").exists() and "## Evaluation" not in check_well_formed(folder)


def test_the_fingerprint_is_that_of_the_tensors(tmp_path):
    """Not of how they lie in files; another model, type or a single other value has another one."""
    model, folders = tiny_model(), [tmp_path / name for name in ("whole", "shards", "seed", "half", "value")]
    model.save_pretrained(folders[0])
    model.save_pretrained(folders[1], max_shard_size="200KB")
    assert len(list(folders[1].glob("model*.safetensors"))) > 1
    tiny_model(seed=1).save_pretrained(folders[2])
    tiny_model().half().save_pretrained(folders[3])
    with torch.no_grad():
        model.get_output_embeddings().weight[-1, -1] += 1e-3
    model.save_pretrained(folders[4])
    whole, shards, *others = map(weights_fingerprint, folders)
    assert whole == shards and len({whole, *others}) == 4
    assert weights_fingerprint(tmp_path) is None
    weights = folders[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        weights_fingerprint(folders[0])


def test_results_belong_to_the_weights_they_were_measured_on(folder, tmp_path):
    results = tmp_path / "metrics.json"

    def card(**weights) -> str:
        results.write_text(json.dumps({**EVALUATION, **weights}))
        main([str(folder), "--evaluation", str(results), "--dataset", "org/scenes"])
        return check_well_formed(folder)

    scores = "| pope | 600 | f1 | 61.25"
    for before in ({}, {"weights": None}):
        assert scores in card(**before) and "**Unchecked**" in card(**before)
    own = card(weights=weights_fingerprint(folder))
    assert scores in own and "Unchecked" not in own
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"metrics\.json was measured on other weights .*0ther and [0-9a-f]{32}"):
        card(weights="0ther")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    results_on_hub = {"agevlm_evaluation.json", ".eval_results/pope.yaml"}
    assert published_files(folder).keys() >= results_on_hub
    tiny_model(seed=1).save_pretrained(folder)  # trained again
    text = check_well_formed(write_card(folder).parent)
    assert scores not in text and "`agevlm_evaluation.json` were measured on other weights and are left out" in text
    assert not published_files(folder).keys() & results_on_hub


def test_mistakes_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, message in (
        ([str(tmp_path / "nowhere")], "There is no folder"),
        ([str(tmp_path / "empty")], "neither a checkpoint"),
        ([str(folder), "--dataset", "scenes"], "NAME/DATASET, got 'scenes'"),
        ([str(folder), "--evaluation", str(folder / "tokenizer.json")], "no result of `agevlm eval`"),
        ([str(folder), "--attention", str(folder / "config.json")], "no PNG picture"),
    ):
        with pytest.raises(ValueError, match=message):
            main(argv)
    assert not (folder / "README.md").exists()
    (folder / "agevlm_stage.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"agevlm_stage\.json is no valid JSON"):
        read_facts(folder)
    (folder / "agevlm_stage.json").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        read_facts(folder)
