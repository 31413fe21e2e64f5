"""From a stage script to a user: trained, pushed, taken up from the Hub by the next stage, loaded by its name.

Everything happens in processes that know the Hub of `hub_server.py` by `HF_ENDPOINT` alone, as users have it.
"""

import json
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from remote_code_worker import isolated, load_without_the_repository
from safetensors.torch import load_file

from agevlm.data.scenes.build import build_scenes
from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
from agevlm.processing import AgeVlmProcessor
from agevlm.training.lineage import INIT_FILE
from builders import picture, save_tiny


REPO = "org/agevlm"
TRAIN = """
import json, sys
from agevlm.training.train import main
for argv in json.loads(sys.argv[1]):
    main(argv)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with stage 1, and stage 2 which has started from it there; with the folder that holds both runs."""
    folder = tmp_path_factory.mktemp("roundtrip")
    start = folder / "start"
    save_tiny(start)
    made = {
        "language_model": {"source": "meta-llama/Llama-3.2-1B-Instruct", "revision": "abc"},
        "vision_tower": {"source": "tower.safetensors", "revision": None},
    }
    (start / INIT_FILE).write_text(json.dumps(made))
    build_scenes(folder / "scenes", captions=16, instructions=8, test=4, size=96, max_objects=3, progress=False)
    flags = ["--size", "tiny", "--data", str(folder / "scenes"), "--max_steps", "2", "--disable_tqdm", "True"]
    flags += ["--logging_steps", "1"]
    push = ["--push_to_hub", "--hub_model_id", REPO]
    runs = [
        ["stage1_align", *flags, *push, "--init_from", str(start), "--output_dir", str(folder / "stage1")],
        ["stage2_adapt_vision", *flags, *push, "--init_from", REPO, "--output_dir", str(folder / "stage2")],
    ]
    runs[1] += ["--revision", "stage1-align"]
    with HubServer(folder / "contents") as hub:
        done = isolated(folder, "-c", TRAIN, json.dumps(runs), HF_TOKEN=TOKEN, **hub.environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("on the Hub as") == 2 and TOKEN not in done.stdout + done.stderr
        yield hub, folder


def test_both_stages_are_there_by_their_tags_and_know_where_they_come_from(published):
    hub, folder = published
    repo = hub.repos["model", REPO]
    assert repo.private and set(repo.tags) == {"stage1-align", "stage2-adapt-vision"}
    for tag, name in (("stage1-align", "stage1"), ("stage2-adapt-vision", "stage2")):
        shown = hub.files(REPO, tag)
        assert shown["model.safetensors"] == (folder / name / "model.safetensors").read_bytes()
        lineage = json.loads(shown["agevlm_stage.json"])
        assert lineage["base_models"] == ["meta-llama/Llama-3.2-1B-Instruct"]
        card = shown["README.md"].decode()
        assert "**Intermediate checkpoint**" in card and "license: llama3.2" in card and "loss.png" in shown
    assert hub.files(REPO) == shown  # main is at the last one
    first = repo.tags["stage1-align"].oid
    assert lineage["parent"] == {"init_from": REPO, "repo": REPO, "revision": first}
    assert f"--init_from {REPO} --revision {first}" in card


def test_stage_2_has_trained_what_the_tag_of_stage_1_holds(published):
    _, folder = published
    first, second = (load_file(folder / name / "model.safetensors") for name in ("stage1", "stage2"))
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved and not any("vision_tower.encoder.stages.0" in name or "embed_tokens" in name for name in moved)


def test_nothing_on_the_hub_names_a_place_of_this_machine_or_a_token(published):
    hub, folder = published
    for tag in hub.repos["model", REPO].tags:
        for name, content in hub.files(REPO, tag).items():
            for secret in (TOKEN, str(folder), str(folder.parent), str(Path.home())):
                assert secret.encode() not in content, (tag, name)


def test_a_user_without_the_repository_loads_it_by_its_name_and_asks(published, tmp_path):
    hub, folder = published
    model = AgeVlmForConditionalGeneration.from_pretrained(folder / "stage2")
    processor = AgeVlmProcessor.from_pretrained(folder / "stage2")
    done = load_without_the_repository(
        REPO, model, processor, picture(50, 90), tmp_path, HF_TOKEN=TOKEN, **hub.environment
    )
    assert TOKEN not in done.stderr
