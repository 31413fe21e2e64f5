"""Pushing finished checkpoints: complete and private in one commit, whatever breaks, and again until it is there.

The Hub is that of `hub_server.py`; the client is huggingface_hub itself.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import training_worker
from hub_server import READ_TOKEN, TOKEN, HubServer, connect
from rich.console import Console
from safetensors.torch import load_file, save_file
from training_worker import make_arguments, make_trainer
from workers import same_weights

from agevlm.training import publish
from agevlm.training.cli import push as main
from agevlm.training.lineage import read_lineage, write_lineage
from agevlm.training.publish import PushError, publish_stage, published_files, push, read_record
from builders import save_tiny, tiny_model


NAMES = {1: "stage1_align", 2: "stage2_adapt_vision", 3: "stage3_ground", 4: "stage4_instruct"}
MODEL = {
    "README.md",
    "config.json",
    "model.safetensors",
    "modeling_agevlm.py",
    "processing_agevlm.py",
    "tokenizer.json",
}
ESSENTIAL = {*MODEL, "agevlm_stage.json"}


def make_stage(folder: Path, stage: int = 1, seed: int = 0, parent: dict | None = None) -> Path:
    """A finished stage, without the training."""
    save_tiny(folder, tiny_model(seed))
    lineage = {
        "name": NAMES[stage],
        "stage": stage,
        "variant": "agevlm",
        "size": "tiny",
        "status": "finished",
        "repo": None,
        "parent": {"init_from": "start", "revision": None, "repo": None, **(parent or {})},
        "recipe_hash": f"{seed:08x}",
    }
    write_lineage(folder, lineage)
    log = [{"step": step, "loss": 1 / step} for step in range(1, 4)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_stage(tmp_path_factory.mktemp("made") / "stage1_align")


@pytest.fixture
def stage(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "stage1_align"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        connect(server, monkeypatch)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in published_files(folder).items()}


def check_published(hub: HubServer, folder: Path, name: str = "org/m", tag: str = "stage1-align") -> None:
    """What the Hub shows is the folder, at main and at the tag, made by one commit after the Hub's own first one."""
    for revision in ("main", tag):
        shown = hub.files(name, revision)
        assert shown.pop(".gitattributes") == b""
        assert shown == contents(folder) and shown.keys() >= ESSENTIAL
    assert [len(commit.files) > 1 for commit in hub.commits(name)] == [True, False]
    assert hub.repos["model", name].private


# ---- What is pushed ----


def test_a_push_is_one_private_commit_with_card_and_tag_and_nothing_else(hub, stage):
    foreign = ("optimizer.pt", "training_args.bin", ".env", "notes.log", "credentials.json", "notes.txt", "photo.png")
    foreign += (
        "my_script.py",
        "my_agevlm.py",
        "stopped-before-step-3.json",
        "NOTES.md",
        "other.safetensors",
        "x.model",
    )
    for name in foreign:
        (stage / name).write_text(TOKEN)
    (stage / "checkpoint-2").mkdir()
    (stage / "checkpoint-2" / "config.json").write_text("{}")
    record = push(stage, "org/m")
    check_published(hub, stage)
    assert record == read_record(stage)
    assert (record["status"], record["tag"], record["tries"]) == ("pushed", "stage1-align", 1)
    assert record["commit"] == hub.commits("org/m")[0].oid
    shown = hub.files("org/m")
    assert not any(name in foreign or "/" in name for name in shown)
    assert publish.PUSH_FILE not in shown
    card = shown["README.md"].decode()
    assert 'repo = "org/m"' in card and 'revision="stage1-align"' in card and "![Loss over steps](loss.png)" in card
    assert read_lineage(stage)["repo"] == "org/m"


def test_nothing_that_is_pushed_or_recorded_holds_a_token_or_a_place_of_this_machine(hub, stage, tmp_path, capsys):
    push(stage, "org/m", token=TOKEN)
    hub.users.pop(TOKEN)
    with pytest.raises(PushError) as error:
        push(stage, "org/other", token=TOKEN)
    printed = capsys.readouterr()
    written = (stage / publish.PUSH_FILE).read_bytes() + str(error.value).encode() + printed.out.encode()
    for content in [*hub.files("org/m").values(), written, printed.err.encode()]:
        assert TOKEN.encode() not in content
    for name, content in hub.files("org/m").items():
        assert str(tmp_path).encode() not in content, name


def test_pushing_again_sends_and_commits_nothing(hub, stage):
    first = push(stage, "org/m")
    uploaded = hub.uploaded
    assert uploaded > 0
    assert push(stage)["commit"] == first["commit"]
    assert hub.uploaded == uploaded
    check_published(hub, stage)


def test_the_namespace_of_the_token_and_what_the_command_line_says(hub, stage, capsys):
    main([str(stage), "m", "--public"])
    assert not hub.repos["model", "tester/m"].private
    assert f"on the Hub as {hub.address}/tester/m, tag stage1-align" in capsys.readouterr().out
    main([str(stage), "--hub_model_id", "org/m", "--branch", "draft"])
    assert "model.safetensors" not in hub.files("org/m") and "model.safetensors" in hub.files("org/m", "draft")
    with pytest.raises(ValueError, match="There is no folder"):
        main([str(stage / "nowhere")])


# ---- Several stages in one repository ----


def test_each_stage_has_its_tag_and_main_the_last_one(hub, stage, tmp_path):
    second = make_stage(tmp_path / "stage2", 2, seed=2)
    for folder in (stage, second):
        push(folder, "org/m")
    assert hub.files("org/m") == hub.files("org/m", "stage2-adapt-vision")
    for folder, tag in ((stage, "stage1-align"), (second, "stage2-adapt-vision")):
        assert {**hub.files("org/m", tag), ".gitattributes": b""} == {**contents(folder), ".gitattributes": b""}


def test_a_stage_that_was_trained_again_moves_its_tag_and_leaves_no_weights_of_the_old_one(hub, stage, tmp_path):
    weights = load_file(stage / "model.safetensors")
    half = len(weights) // 2
    shards = {
        "model-00001-of-00002.safetensors": list(weights)[:half],
        "model-00002-of-00002.safetensors": list(weights)[half:],
    }
    for name, tensors in shards.items():
        save_file({tensor: weights[tensor] for tensor in tensors}, stage / name)
    index = {"weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors}}
    (stage / "model.safetensors.index.json").write_text(json.dumps(index))
    (stage / "model.safetensors").unlink()
    (stage / ".eval_results").mkdir()
    (stage / ".eval_results" / "pope.yaml").write_text("- value: 1\n")
    old = push(stage, "org/m")
    repo = hub.repos["model", "org/m"]
    hub.commit(repo, "main", "by hand", {"examples.md": hub.store("examples.md", b"mine")})

    again = make_stage(tmp_path / "again", seed=5)
    new = push(again, "org/m")
    shown = hub.files("org/m", "stage1-align")
    assert shown.pop("examples.md") == b"mine"
    assert (
        {**contents(again), ".gitattributes": b""}
        == shown
        == {k: v for k, v in hub.files("org/m").items() if k in shown}
    )
    assert new["commit"] != old["commit"]
    assert {"model-00001-of-00002.safetensors", ".eval_results/pope.yaml"} <= hub.files("org/m", old["commit"]).keys()


# ---- What is refused ----


def test_only_finished_and_whole_checkpoints_are_pushed(hub, stage, tmp_path):
    with pytest.raises(ValueError, match="was never pushed: name the repository"):
        push(stage)
    lineage = read_lineage(stage)
    write_lineage(stage, {**lineage, "status": "unfinished"})
    with pytest.raises(ValueError, match=r"unfinished run \(stage1_align\)"):
        push(stage, "org/m")
    write_lineage(stage, lineage)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (stage / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no checkpoint: there is no model-00001-of-00002\.safetensors"):
        push(stage, "org/m")
    with pytest.raises(ValueError, match=r"no checkpoint: there is no model\.safetensors"):
        push(tmp_path, "org/m")
    assert not hub.requests


# ---- What breaks ----

COMMIT, UPLOAD, TAG, CREATE = "POST .*/commit/", "PUT /lfs/", "POST .*/tag/", "POST /api/repos/create"


@pytest.mark.parametrize(
    ("pattern", "how", "sentence"),
    [
        (CREATE, 500, "{hub} answered with status 500"),
        (COMMIT, 500, "{hub} answered with status 500"),
        (UPLOAD, 503, "{hub} answered with status 503"),
        (TAG, 502, "{hub} answered with status 502"),
        (CREATE, "cut", "the connection to {hub} broke"),
        (UPLOAD, "cut in the middle", "the connection to {hub} broke"),
        (COMMIT, "cut in the middle", "the connection to {hub} broke"),
        (CREATE, "hang", "{hub} did not answer in time"),
        (UPLOAD, "hang", "{hub} did not answer in time"),
        (COMMIT, "hang", "{hub} did not answer in time"),
        (UPLOAD, 507, "{hub} has no space left for org/m (status 507)"),
        (COMMIT, 401, "{hub} does not accept the token (status 401); log in with `hf auth login`"),
        (COMMIT, 403, "the token may not write to org/m (status 403); take one that may, or another repository"),
    ],
)
def test_what_the_hub_does_wrong_loses_nothing_and_the_next_push_works(
    hub, stage, monkeypatch, pattern, how, sentence
):
    monkeypatch.setattr(publish, "SILENCE", 0.3)
    before = contents(stage)
    hub.fail(pattern, how, times=1000)
    with pytest.raises(PushError) as error:
        push(stage, "org/m")
    said = sentence.format(hub=hub.address)
    assert str(error.value) == (
        f"{stage} is complete, but not on the Hub: {said}. Push it later with `agevlm push {stage} org/m`."
    )
    record = read_record(stage)
    assert (record["status"], record["error"]) == ("failed", said)
    assert record["tries"] == (1 if how in (401, 403, 507) else 3)
    after = contents(stage)
    assert before == {name: after[name] for name in before if name not in ("README.md", "agevlm_stage.json")} | {
        name: before[name] for name in ("agevlm_stage.json",)
    }
    seen = [hub.files("org/m", commit.oid) for commit in hub.commits("org/m")] if hub.repos else []
    assert all(files.keys() == {".gitattributes"} or files.keys() >= ESSENTIAL for files in seen)

    hub.faults.clear()
    monkeypatch.setattr(publish, "SILENCE", 60)
    assert push(stage)["status"] == "pushed"
    check_published(hub, stage)


@pytest.mark.parametrize("how", [500, "cut", "cut in the middle", "lost"])
@pytest.mark.parametrize("pattern", [CREATE, UPLOAD, COMMIT, TAG])
def test_what_goes_wrong_once_is_tried_again_at_once(hub, stage, pattern, how):
    hub.fail(pattern, how)
    assert push(stage, "org/m")["status"] == "pushed"
    check_published(hub, stage)


def test_tokens_that_are_missing_wrong_or_may_only_read(hub, stage, monkeypatch):
    for token, sentence in (
        ("hf_wrong", "does not accept the token"),
        (READ_TOKEN, "the token may not write to org/m"),
    ):
        with pytest.raises(PushError, match=sentence) as error:
            push(stage, "org/m", token=token)
        assert token not in str(error.value)
    connect(hub, monkeypatch, token=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stage / "no-token"))
    with pytest.raises(PushError, match=r"does not accept the token \(status 401\); log in"):
        push(stage, "org/m")
    with pytest.raises(PushError, match=r"'not a name' is no name of a repository"):
        push(stage, "not a name")
    assert not hub.repos


def test_a_hub_that_is_not_there(hub, stage, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        push(stage, "org/m")


def test_a_full_disk_here(hub, stage, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish, "_write_record", full)
    before = contents(stage)
    with pytest.raises(PushError, match="there is no space left on this machine"):
        push(stage, "org/m")
    assert contents(stage) == before and not hub.repos
    monkeypatch.undo()
    connect(hub, monkeypatch)
    push(stage, "org/m")
    check_published(hub, stage)


# ---- Killed while pushing ----


def push_and_be_killed(hub: HubServer, stage: Path, moment: int) -> bool:
    """Push in another process, which is killed at the `moment`-th thing that the Hub sees; whether it came to that.

    Each request is three things: it begins, it was received, it is answered (and has had its effect).
    """
    child = multiprocessing.get_context("fork").Process(target=push, args=(stage, "org/m"))
    seen = []

    def kill(when: str, what: str) -> None:
        with hub.lock:
            seen.append(what)
            if len(seen) == moment:
                os.kill(child.pid, signal.SIGKILL)
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    hub.on_request = kill
    child.start()
    child.join(60)
    hub.on_request = lambda when, what: None
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


MOMENTS = 40  # more than a push has
SHUFFLED = random.Random(0).sample(range(1, MOMENTS), MOMENTS - 1)


@pytest.mark.parametrize(
    "moment", [*SHUFFLED[:5], *(pytest.param(moment, marks=pytest.mark.slow) for moment in SHUFFLED[5:])]
)
def test_a_push_that_is_killed_shows_nothing_partial_and_the_next_one_finishes_it(hub, stage, moment):
    before = (stage / "model.safetensors").read_bytes()
    for again in (moment, moment + 2):  # killed twice
        killed = push_and_be_killed(hub, stage, again)
        assert (stage / "model.safetensors").read_bytes() == before
        if read_record(stage).get("status", "pending") == "pushed":
            check_published(hub, stage)  # the kill came when all was done
        else:
            assert killed and read_record(stage).get("status", "pending") == "pending"
        for repo in hub.repos.values():
            for commit in repo.branches["main"]:
                files = hub.files("org/m", commit.oid)
                assert files.keys() == {".gitattributes"} or files == {**contents(stage), ".gitattributes": b""}
            for tag in repo.tags:
                assert hub.files("org/m", tag).keys() >= ESSENTIAL
    sent = hub.uploaded
    assert push(stage, "org/m")["status"] == "pushed"
    check_published(hub, stage)
    assert hub.uploaded in (sent, sum(map(len, lfs_files(stage))))  # what had arrived is not sent again


def lfs_files(stage: Path) -> list[bytes]:
    return [content for name, content in contents(stage).items() if name.endswith((".safetensors", ".png"))]


WHOLE_RUN = """
import sys
import torch
from training_worker import run_small_stage
torch.set_num_threads(1)
print("ready", flush=True)
run_small_stage(sys.argv[1], push_to_hub=True, hub_model_id="org/m")
"""


def whole_run(folder: Path, hub: HubServer) -> subprocess.Popen:
    """A stage with its push in a process of its own, which has imported everything."""
    here = Path(training_worker.__file__).parent
    known = {"PYTHONPATH": str(here), "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", WHOLE_RUN, str(folder)]
    process = subprocess.Popen(command, env={**os.environ, **known}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_runs_that_are_killed_anywhere_end_with_the_same_weights_here_and_on_the_hub(tmp_path, seed):
    with HubServer(tmp_path / "whole-hub") as hub:
        process, start = whole_run(tmp_path / "whole", hub), time.monotonic()
        assert process.wait() == 0
        duration = time.monotonic() - start
    chance, kills = random.Random(seed), 0
    with HubServer(tmp_path / "hub") as hub:
        for number in range(4):
            process = whole_run(tmp_path / "run", hub)
            moment, seen = chance.randrange(1, MOMENTS), []

            def kill_at_request(when: str, what: str, process=process, moment=moment, seen=seen) -> None:
                seen.append(what)
                if len(seen) == moment:
                    process.kill()

            if number % 2:  # while it talks to the Hub
                hub.on_request = kill_at_request
            else:  # at any time
                with suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, duration))
                process.kill()
            kills += process.wait() == -signal.SIGKILL
            hub.on_request = lambda when, what: None
            for repo in hub.repos.values():
                for commit in [*repo.branches["main"], *repo.tags.values()]:
                    shown = commit.files.keys()
                    assert shown == {".gitattributes"} or shown >= ESSENTIAL
        assert kills > 0
        assert whole_run(tmp_path / "run", hub).wait() == 0
        assert same_weights(tmp_path / "whole", tmp_path / "run")
        check_published(hub, tmp_path / "run", tag="stage3-ground")


# ---- Stages ----


def arguments(folder: Path, **changes):
    return make_arguments(folder, push_to_hub=True, hub_model_id="org/m", **changes)


def told(call) -> str:
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    call(console)
    return console.export_text()


def test_a_stage_whose_push_fails_is_told_and_finished_with_the_next_stage(hub, stage, tmp_path, monkeypatch):
    hub.fail(".*", 500, times=1000)
    text = told(lambda console: publish_stage(stage, arguments(stage), None, console))
    assert "is complete, but not on the Hub" in text and f"agevlm push {stage} org/m" in text
    assert read_record(stage)["status"] == "failed" and not hub.repos

    second = make_stage(tmp_path / "stage2", 2, seed=2)
    hub.faults.clear()
    text = told(lambda console: publish_stage(second, arguments(second), stage, console))
    assert "tag stage1-align" in text and "tag stage2-adapt-vision" in text
    tags = hub.repos["model", "org/m"].tags
    link = {"init_from": "start", "repo": "org/m", "revision": tags["stage1-align"].oid}
    assert read_lineage(second)["parent"] == link
    assert (
        f"| revision of it | {link['revision']} |" in hub.files("org/m", "stage2-adapt-vision")["README.md"].decode()
    )

    asked = len(hub.requests)
    assert told(lambda console: publish_stage(second, arguments(second), stage, console)) == ""
    assert len(hub.requests) == asked


def test_a_folder_of_other_origin_does_not_say_where_it_is_pushed(hub, stage, tmp_path):
    record = {"status": "failed", "repo": "org/other", "private": False, "branch": None, "tag": None}
    (stage / "agevlm_push.json").write_text(json.dumps(record))
    second = make_stage(tmp_path / "stage2", 2, seed=2)
    publish_stage(second, arguments(second), stage, Console(quiet=True))
    assert set(hub.repos) == {("model", "org/m")}
    assert set(hub.repos["model", "org/m"].tags) == {"stage2-adapt-vision"}


def test_without_the_flag_and_on_other_processes_nothing_is_pushed(hub, stage, monkeypatch):
    publish_stage(stage, make_arguments(stage), None, Console(quiet=True))
    args = arguments(stage)
    monkeypatch.setattr(type(args), "process_index", 1)
    publish_stage(stage, args, None, Console(quiet=True))
    publish.warn_early(args, Console(quiet=True))
    assert not hub.requests


def test_a_useless_token_is_noticed_before_training(hub, stage):
    good, bad = arguments(stage), arguments(stage, hub_token="hf_wrong")
    assert told(lambda console: publish.warn_early(good, console)) == ""
    text = told(lambda console: publish.warn_early(bad, console))
    assert "does not accept the token" in text and "Training continues" in text and "hf_wrong" not in text


def test_trainers_own_push_goes_the_same_way(hub, tmp_path):
    trainer = make_trainer(
        tmp_path / "run", max_steps=1, push_to_hub=True, hub_model_id="org/m", save_strategy="steps"
    )
    trainer.train()
    assert not hub.repos  # it is asked when there is something to push
    record = trainer.push_to_hub("by hand")
    assert (record["status"], hub.commits("org/m")[0].title) == ("pushed", "by hand")
    shown = hub.files("org/m")
    assert shown.keys() >= MODEL and "training_args.bin" not in shown
    expected = dict(trainer.model.named_parameters())
    (tmp_path / "back.safetensors").write_bytes(shown["model.safetensors"])
    assert all(
        torch.equal(expected[name], tensor) for name, tensor in load_file(tmp_path / "back.safetensors").items()
    )
    with pytest.raises(ValueError, match="blocking=False"):
        trainer.push_to_hub(blocking=False)
    trainer.release_model()


@pytest.mark.parametrize(
    "text",
    [
        "Illegal header value b'Bearer {}'",
        'headers: {{"authorization": "Bearer {}"}}',
        "cannot log in as {}",
        "https://user:{}@host/x",
        "{}",
    ],
)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError])
def test_no_error_is_passed_on_with_a_token_in_it(text, kind):
    token = "hf_" + "aB3" * 11
    reason = publish.explain(kind(text.format(token)), "org/m")
    assert token not in reason and token[3:] not in reason and "(token)" in reason and kind.__name__ in reason
